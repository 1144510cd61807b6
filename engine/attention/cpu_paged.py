"""Attention over paged keys and values by the C++ kernels for a CPU."""

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from itertools import accumulate

from torch import Tensor

from engine.attention.base import AttentionMetadata, KVCache
from engine.attention.rotary import Rotation
from engine.kernels.cpu_kernels import CPUKernels


class _Step(ctypes.Structure):
    """`AttentionStep` of engine/kernels/cpu/attention_cache.h."""

    _fields_ = (
        ("num_seqs", c_int64),
        ("cu_seqlens_q", c_void_p),
        ("seq_lens", c_void_p),
        ("block_tables", c_void_p),
        ("table_starts", c_void_p),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("block_size", c_int64),
    )


class CPUPagedAttention:
    """Attention of one step. See `engine.attention.base.Attention`.

    Rotation, writing to the cache and attention are one call a layer. A row's bits depend on its sequence alone.

    Args:
        kernels: what computes.
        kv_caches: one a layer, all of the same shape. Within a block, elements lie as
            engine/kernels/cpu/attention_cache.h says.
        metadata: the step.
    """

    def __init__(self, kernels: CPUKernels, kv_caches: Sequence[KVCache], metadata: AttentionMetadata) -> None:
        self._kernels = kernels
        self._kv_caches = kv_caches
        _, block_size, self._num_kv_heads, head_dim = kv_caches[0].key.shape
        tables = array("i")
        for table in metadata.block_tables:
            tables += table
        starts = array("q", accumulate((len(table) for table in metadata.block_tables), initial=0))
        self._arrays = (array("q", metadata.cu_seqlens_q), array("q", metadata.seq_lens), tables, starts)
        self._step = _Step(
            len(metadata.seq_lens),
            *(values.buffer_info()[0] for values in self._arrays),
            num_kv_heads=self._num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
        )

    def __call__(self, layer_index: int, heads: Tensor, rotation: Rotation) -> Tensor:
        """Attend; see `Attention`."""
        num_tokens, num_heads, head_dim = heads.shape
        self._step.num_heads = num_heads - 2 * self._num_kv_heads
        attended = heads.new_empty((num_tokens, self._step.num_heads, head_dim))
        cache = self._kv_caches[layer_index]
        self._kernels.paged_attention(
            self._kernels.pool,
            attended.data_ptr(),
            heads.data_ptr(),
            rotation.cos.data_ptr(),
            rotation.sin.data_ptr(),
            cache.key.data_ptr(),
            cache.value.data_ptr(),
            ctypes.byref(self._step),
        )
        return attended
