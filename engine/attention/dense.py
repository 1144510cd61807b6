"""Attention without a cache, for training."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from engine.attention.causal import causal_attention
from engine.attention.rotary import Rotation, rotate_heads


class DenseCausalAttention:
    """Attention of whole sequences, packed one after the other; differentiable. See `engine.attention.base.Attention`.

    Args:
        cu_seqlens: sequence i has the tokens `cu_seqlens[i] : cu_seqlens[i + 1]`.
        num_kv_heads: of this rank.
    """

    def __init__(self, cu_seqlens: Sequence[int], num_kv_heads: int) -> None:
        self._bounds = list(pairwise(cu_seqlens))
        self._num_kv_heads = num_kv_heads

    def __call__(self, layer_index: int, heads: Tensor, rotation: Rotation) -> Tensor:  # noqa: ARG002
        """Attend; see `Attention`. Nothing is kept, so the layer does not matter."""
        query, key, value = rotate_heads(heads, rotation, self._num_kv_heads)
        return torch.cat(
            [causal_attention(query[start:stop], key[start:stop], value[start:stop]) for start, stop in self._bounds]
        )
