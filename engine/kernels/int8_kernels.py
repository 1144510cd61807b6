"""The C++ kernels for int8 matrices."""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.kernels.library import KernelLibrary
from engine.kernels.torch_kernels import TORCH_KERNELS

MOST_PRECISE = 2  # terms of 8 bits that activations are rounded to: as precise as bfloat16, at twice the instructions
MOST_PRECISE_TOKENS = 4  # so many are computed with two terms in about the time that reading the matrix takes
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Int8Kernels:
    """Products with int8 matrices, and the rounding of matrices to int8; see `engine.kernels.base.Kernels`.

    Where there is VNNI, activations are rounded to integers too, by a scale for each token: to 16 bits for few tokens,
    and to 8 bits for more, where arithmetic and not memory is what takes time. Elsewhere they stay what they are.

    Args:
        library: the kernels.
        pool: their threads.
        dtype: of activations; one of `SUFFIXES`.
        is_batch_invariant: round to 16 bits always, so that a token's result does not depend on how many there are.
    """

    def __init__(
        self, library: KernelLibrary, pool: int, dtype: torch.dtype, *, is_batch_invariant: bool = False
    ) -> None:
        suffix = SUFFIXES[dtype]
        self._pool = pool
        self._is_batch_invariant = is_batch_invariant
        self._linear = library.function(f"linear_int8_{suffix}")
        self._logits = library.function("linear_int8_f32" if dtype == torch.float32 else f"linear_int8_{suffix}_f32")
        self._scales = {of: library.function(f"int8_scales_{name}") for of, name in SUFFIXES.items()}
        self._rows = {of: library.function(f"int8_rows_{name}") for of, name in SUFFIXES.items()}

    def linear(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + b, of the type of x."""
        return self._multiply(self._linear, x.dtype, x, weight, scale, bias)

    def logits(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """Return x W^T in float32."""
        return self._multiply(self._logits, torch.float32, x, weight, scale, None)

    def scales(self, weight: Tensor) -> Tensor:
        """Return the scale of each row."""
        if weight.dtype not in self._scales:
            return TORCH_KERNELS.int8_scales(weight)
        scales = torch.empty(len(weight), dtype=torch.float32)
        self._scales[weight.dtype](self._pool, scales.data_ptr(), weight.data_ptr(), *weight.shape, weight.stride(0))
        return scales

    def rows(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Return the rows over their scales, rounded."""
        if weight.dtype not in self._rows:
            return TORCH_KERNELS.int8_rows(weight, scales)
        rows = torch.empty(weight.shape, dtype=torch.int8)
        pointers = rows.data_ptr(), weight.data_ptr(), scales.data_ptr()
        self._rows[weight.dtype](self._pool, *pointers, *weight.shape, weight.stride(0))
        return rows

    def _multiply(
        self,
        function: Callable[..., None],
        dtype: torch.dtype,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        num_tokens, in_features = x.shape
        y = torch.empty((num_tokens, len(weight)), dtype=dtype)
        is_precise = self._is_batch_invariant or num_tokens <= MOST_PRECISE_TOKENS
        function(
            self._pool,
            y.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            num_tokens,
            len(weight),
            in_features,
            MOST_PRECISE if is_precise else 1,
        )
        return y
