"""The contract between a model's attention layers and whatever computes attention."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from engine.attention.rotary import Rotation


class KVCache(NamedTuple):
    """One layer's paged keys and values on this rank, each `[num_blocks, block_size, num_kv_heads, head_dim]`."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the tokens of one step lie. Sequences are packed one after the other, in batch order.

    Sequence i has the step's tokens `cu_seqlens_q[i] : cu_seqlens_q[i + 1]`; they are the last of its `seq_lens[i]`
    tokens. Token p of sequence i lies in slot `block_tables[i, p // block_size] * block_size + p % block_size`.
    """

    cu_seqlens_q: list[int]  # num_seqs + 1
    seq_lens: list[int]  # num_seqs, the step's tokens included
    block_tables: Tensor  # [num_seqs, max_num_blocks] int64, rows padded with 0
    slot_mapping: Tensor  # [num_tokens] int64: where each of the step's tokens is written


class Attention(Protocol):
    """Causal attention of one step, for any layer. Made anew for each step: layers need not know its sequences.

    All keys and values of the step are in the cache before any query attends: sequences may share blocks, and one may
    read what another writes in the same step.
    """

    def __call__(self, layer_index: int, heads: Tensor, rotation: Rotation) -> Tensor:
        """Rotate queries and keys, keep keys and values in the cache, if there is one, and attend.

        Args:
            layer_index: which layer's cache to use.
            heads: `[num_tokens, num_heads + 2 num_kv_heads, head_dim]`: each token's queries, then keys, then values.
            rotation: of the step's tokens.

        Returns:
            `[num_tokens, num_heads, head_dim]`.
        """
        ...
