"""Attention over paged keys and values in plain torch operations: serves CPU and CUDA alike."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.base import AttentionMetadata, KVCache
from engine.attention.causal import causal_attention
from engine.attention.rotary import Rotation, rotate_heads

SHORT = 256  # tokens; below this, one call for all costs less than the padding it needs


class _Decodes(NamedTuple):
    """Sequences of similar length, each with one token in the step."""

    tokens: Tensor  # [num_seqs]: where the step has their tokens
    rows: Tensor  # [num_seqs, num_kv_heads, longest]: rows of the cache seen as [-1, head_dim]
    visible: Tensor  # [num_seqs, 1, 1, longest]: false behind a sequence's end


class _Chunk(NamedTuple):
    """One sequence with several tokens in the step."""

    start: int
    stop: int
    rows: Tensor  # [num_kv_heads, seq_len]


class PagedAttention:
    """Attention of one step: writes its keys and values to their slots, then attends over the sequences' pages.

    Where the step's sequences lie is worked out once, here, for all layers. Sequences with one token are computed
    together with others of up to twice their length (or all `SHORT` ones), the rest one by one. See
    `engine.attention.base.Attention`.

    Args:
        kv_caches: one a layer, all of the same shape, elements in its order.
        metadata: the step.
    """

    def __init__(self, kv_caches: Sequence[KVCache], metadata: AttentionMetadata) -> None:
        self._kv_caches = kv_caches
        self._device = kv_caches[0].key.device
        _, self._block_size, self._num_kv_heads, _ = kv_caches[0].key.shape
        self._slot_mapping = self._slots_of_step(metadata)
        singles: dict[int, list[int]] = {}
        self._chunks: list[_Chunk] = []
        for i, (start, stop) in enumerate(pairwise(metadata.cu_seqlens_q)):
            if stop - start == 1:
                singles.setdefault((metadata.seq_lens[i] // SHORT).bit_length(), []).append(i)
            elif stop > start:
                self._chunks.append(_Chunk(start, stop, self._rows(metadata, [i])[0]))
        self._decodes = [self._plan_decodes(metadata, members) for members in singles.values()]

    def __call__(self, layer_index: int, heads: Tensor, rotation: Rotation) -> Tensor:
        """Attend; see `Attention`."""
        query, key, value = rotate_heads(heads, rotation, self._num_kv_heads)
        cache = self._kv_caches[layer_index]
        cache.key.flatten(0, 1).index_copy_(0, self._slot_mapping, key)
        cache.value.flatten(0, 1).index_copy_(0, self._slot_mapping, value)
        attended = torch.empty_like(query)
        for decodes in self._decodes:
            attended[decodes.tokens] = self._decode(cache, decodes, query[decodes.tokens])
        for start, stop, rows in self._chunks:
            keys, values = (_gather(x, rows).transpose(0, 1) for x in cache)
            attended[start:stop] = causal_attention(query[start:stop], keys, values)
        return attended

    def _decode(self, cache: KVCache, decodes: _Decodes, query: Tensor) -> Tensor:
        # The heads that share a KV head become its queries, so that each key is read once for all of them.
        grouped = query.reshape(query.shape[0], self._num_kv_heads, -1, query.shape[-1])
        keys, values = (_gather(x, decodes.rows) for x in cache)
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=decodes.visible).view_as(query)

    def _slots_of_step(self, metadata: AttentionMetadata) -> Tensor:
        """Return where each of the step's tokens is written, `[num_tokens]`: its slot, counted over all blocks."""
        size, slots = self._block_size, []
        for table, length, (start, stop) in zip(
            metadata.block_tables, metadata.seq_lens, pairwise(metadata.cu_seqlens_q), strict=True
        ):
            slots += [table[p // size] * size + p % size for p in range(length - (stop - start), length)]
        return self._tensor(slots)

    def _plan_decodes(self, metadata: AttentionMetadata, members: list[int]) -> _Decodes:
        seq_lens = self._tensor([metadata.seq_lens[i] for i in members])
        positions = torch.arange(max(metadata.seq_lens[i] for i in members), device=self._device)
        return _Decodes(
            tokens=self._tensor([metadata.cu_seqlens_q[i] for i in members]),
            rows=self._rows(metadata, members),
            visible=(positions < seq_lens[:, None])[:, None, None],
        )

    def _rows(self, metadata: AttentionMetadata, members: list[int]) -> Tensor:
        """Return where the members' keys lie, `[num_members, num_kv_heads, longest]`.

        Behind a sequence's end its own last token is repeated: a slot that it never wrote may hold anything, even a
        NaN, which no mask would keep out of a sum.
        """
        longest = max(len(metadata.block_tables[i]) for i in members)
        tables = self._tensor([[*(table := metadata.block_tables[i]), *[0] * (longest - len(table))] for i in members])
        last = self._tensor([[metadata.seq_lens[i] - 1] for i in members])
        positions = torch.arange(max(metadata.seq_lens[i] for i in members), device=self._device).minimum(last)
        slots = tables.gather(1, positions // self._block_size) * self._block_size + positions % self._block_size
        return slots[:, None] * self._num_kv_heads + torch.arange(self._num_kv_heads, device=self._device)[:, None]

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _gather(cache: Tensor, rows: Tensor) -> Tensor:
    """Return the `rows` of a cache as `[*rows.shape, head_dim]`."""
    return cache.view(-1, cache.shape[-1]).index_select(0, rows.flatten()).view(*rows.shape, -1)
