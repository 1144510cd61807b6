"""What a rank computes with, for tests that build its layers themselves."""

import torch

from engine.kernels.base import Kernels
from engine.kernels.cpu_kernels import CPUKernels
from engine.kernels.library import KernelLibrary
from engine.kernels.torch_kernels import TORCH_KERNELS


def make_kernels(name: str, dtype: torch.dtype, num_threads: int = 1, *, is_batch_invariant: bool = False) -> Kernels:
    """Return what computes under `--kernels name`."""
    if name == TORCH_KERNELS.name:
        return TORCH_KERNELS
    library = KernelLibrary(name)
    pool = library.create_pool(num_threads, None, spin_seconds=0.0)
    return CPUKernels(library, pool, dtype, is_batch_invariant=is_batch_invariant)
