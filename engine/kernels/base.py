"""The contract between the layers and whatever computes."""

from typing import Protocol

from torch import Tensor


class Kernels(Protocol):
    """The arithmetic of a layer on one rank. Tensors are contiguous, of one type and on one device."""

    name: str  # as /metrics, the banner and `--kernels` have it

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, weight_scale: Tensor | None = None
    ) -> Tensor:
        """Return x W^T + b: `[num_tokens, out_features]`.

        Args:
            x: `[num_tokens, in_features]`.
            weight: `[out_features, in_features]`; int8 where there is a scale.
            bias: `[out_features]`.
            weight_scale: float32 `[out_features]`; row i of W is then `weight_scale[i] * weight[i]`.
        """
        ...

    def logits(self, x: Tensor, weight: Tensor, weight_scale: Tensor | None = None) -> Tensor:
        """Return x W^T, at least in float32: `[num_rows, vocab_size]`. Arguments are those of `linear`."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return (norm(x + residual), x + residual), each `[num_tokens, size]`; see `engine.parallel.norm.RMSNorm`.

        Args:
            x: `[num_tokens, size]`.
            residual: likewise; None where there is nothing to add, and then x is returned as the sum.
            weight: `[size]`.
            eps: keeps the root from 0.
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Return silu(G) * U, `[num_tokens, size]`, of `[G U]`, `[num_tokens, 2 size]`."""
        ...

    def int8_scales(self, weight: Tensor) -> Tensor:
        """Return the scale of each row that is rounded to int8, float32 `[out_features]`: max |row| / 127.

        Args:
            weight: `[out_features, in_features]` in host memory, of any floating type, each row contiguous.
        """
        ...

    def int8_rows(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Return `weight / scales` to the nearest, ties to even, int8 of the same shape; 0 where the scale is 0.

        Args:
            weight: as for `int8_scales`; columns may be missing.
            scales: what that returned.
        """
        ...
