"""Which attention goes with what a rank computes with."""

from collections.abc import Sequence
from functools import partial

from engine.attention.base import AttentionBackend, KVCache
from engine.attention.cpu_paged import CPUPagedAttention
from engine.attention.torch_paged import PagedAttention
from engine.kernels.base import Kernels
from engine.kernels.cpu_kernels import CPUKernels


def attention_backend(kernels: Kernels, kv_caches: Sequence[KVCache]) -> AttentionBackend:
    """Return what makes the attention of each step over these caches, one a layer."""
    if isinstance(kernels, CPUKernels):
        return partial(CPUPagedAttention, kernels, kv_caches)
    return partial(PagedAttention, kv_caches)
