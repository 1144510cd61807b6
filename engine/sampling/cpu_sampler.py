"""The sampler in C++, for logits that lie in a CPU's memory."""

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.base import Kernels
from engine.kernels.cpu_kernels import CPUKernels
from engine.kernels.library import KernelLibrary
from engine.protocol.messages import SamplingParams
from engine.sampling.sampler import SMALLEST_TEMPERATURE, Sampler, SamplingError, sample, token_or_error

# Params of engine/kernels/cpu/sampling.cpp: seed, choice, position, top_k, top_p, temperature, floor.
PARAMS = struct.Struct("=QIIqdff")


class CPUSampler:
    """Draws what `engine.sampling.sampler.sample` draws.

    Args:
        library: the kernels.
        pool: their threads; see `KernelLibrary.create_pool`.
    """

    def __init__(self, library: KernelLibrary, pool: int) -> None:
        self._sample = library.function("sample")
        self._pool = pool

    def __call__(
        self, logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
    ) -> list[int | SamplingError]:
        """Return the next token of each row, or the error of a row that has none; see `sample`."""
        assert logits.dtype == torch.float32
        assert logits.stride(1) == 1
        assert len(params) == len(positions) == logits.shape[0]
        num_rows, vocab_size = logits.shape
        packed = b"".join(_pack(param, position, vocab_size) for param, position in zip(params, positions, strict=True))
        tokens = torch.empty(num_rows, dtype=torch.int64)
        self._sample(self._pool, tokens.data_ptr(), logits.data_ptr(), logits.stride(0), packed, num_rows, vocab_size)
        return [token_or_error(token) for token in tokens.tolist()]


def _pack(param: SamplingParams, position: int, vocab_size: int) -> bytes:
    return PARAMS.pack(
        param.seed,
        param.choice_index,
        position,
        param.top_k if 0 < param.top_k < vocab_size else vocab_size,
        min(param.top_p, 1.0),
        max(param.temperature, SMALLEST_TEMPERATURE) if param.temperature > 0 else 0.0,
        math.log(min(param.min_p, 1.0)) if param.min_p > 0 else -math.inf,
    )


def choose_sampler(kernels: Kernels) -> Sampler:
    """Return what draws the tokens of a rank that computes with `kernels`."""
    return CPUSampler(kernels.library, kernels.pool) if isinstance(kernels, CPUKernels) else sample
