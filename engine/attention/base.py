"""The contract between a model's attention layers and whatever computes attention."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from engine.attention.rotary import Rotation


class KVCache(NamedTuple):
    """One layer's paged keys and values on this rank, each `[num_blocks, block_size, num_kv_heads, head_dim]`.

    The order of the elements within a block is up to what computes attention.
    """

    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the tokens of one step lie. Sequences are packed one after the other, in batch order.

    Sequence i has the step's tokens `cu_seqlens_q[i] : cu_seqlens_q[i + 1]`; they are the last of its `seq_lens[i]`
    tokens. Token p of sequence i is number `p % block_size` of block `block_tables[i][p // block_size]`.
    """

    cu_seqlens_q: list[int]  # num_seqs + 1
    seq_lens: list[int]  # num_seqs, the step's tokens included
    block_tables: "list[array[int]]"  # num_seqs, of type "i", each at least as long as its sequence's tokens need


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


AttentionBackend = Callable[[AttentionMetadata], Attention]  # makes what computes the attention of one step
