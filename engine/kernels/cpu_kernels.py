"""The C++ kernels for a CPU, behind the contract of the layers."""

import torch
from torch import Tensor

from engine.kernels.int8_kernels import Int8Kernels
from engine.kernels.library import KernelLibrary

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class CPUKernels:
    """See `engine.kernels.base.Kernels`. For inference: nothing here is differentiable.

    Args:
        library: the kernels.
        pool: their threads; see `KernelLibrary.create_pool`.
        dtype: of all tensors; one of `DTYPES`.
        is_batch_invariant: whether a row's bits must not depend on how many rows there are: see `Int8Kernels`; all else
            is so in any case.
    """

    def __init__(
        self, library: KernelLibrary, pool: int, dtype: torch.dtype, *, is_batch_invariant: bool = False
    ) -> None:
        suffix = DTYPES[dtype]
        self.name = library.instruction_set
        self.library = library
        self.pool = pool
        self._linear = library.function(f"linear_{suffix}")
        self._logits = library.function("linear_f32" if dtype == torch.float32 else f"linear_{suffix}_f32")
        self._int8 = Int8Kernels(library, pool, dtype, is_batch_invariant=is_batch_invariant)
        self._add_rms_norm = library.function(f"add_rms_norm_{suffix}")
        self._silu_mul = library.function(f"silu_mul_{suffix}")
        self.paged_attention = library.function(f"paged_attention_{suffix}")  # for engine.attention.cpu_paged

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, weight_scale: Tensor | None = None
    ) -> Tensor:
        """Return x W^T + b; see `Kernels`."""
        if weight_scale is not None:
            return self._int8.linear(x, weight, weight_scale, bias)
        num_tokens, in_features = x.shape
        y = x.new_empty((num_tokens, weight.shape[0]))
        self._linear(
            self.pool,
            y.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            num_tokens,
            weight.shape[0],
            in_features,
        )
        return y

    def logits(self, x: Tensor, weight: Tensor, weight_scale: Tensor | None = None) -> Tensor:
        """Return x W^T in float32; see `Kernels`."""
        if weight_scale is not None:
            return self._int8.logits(x, weight, weight_scale)
        num_rows, in_features = x.shape
        y = torch.empty((num_rows, weight.shape[0]), dtype=torch.float32)
        self._logits(
            self.pool, y.data_ptr(), x.data_ptr(), weight.data_ptr(), None, num_rows, weight.shape[0], in_features
        )
        return y

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return (norm(x + residual), x + residual); see `Kernels`."""
        y = torch.empty_like(x)
        total = x if residual is None else torch.empty_like(x)
        self._add_rms_norm(
            self.pool,
            y.data_ptr(),
            total.data_ptr(),
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            *x.shape,
            eps,
        )
        return y, total

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Return silu(G) * U; see `Kernels`."""
        num_tokens, width = gate_up.shape
        y = gate_up.new_empty((num_tokens, width // 2))
        self._silu_mul(self.pool, y.data_ptr(), gate_up.data_ptr(), num_tokens, width // 2)
        return y

    def int8_scales(self, weight: Tensor) -> Tensor:
        """Return the scale of each row; see `Kernels`."""
        return self._int8.scales(weight)

    def int8_rows(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Return the rows over their scales, rounded; see `Kernels`."""
        return self._int8.rows(weight, scales)
