"""Torch's operations: differentiable, and on every device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.base import Kernels


class TorchKernels:
    """See `engine.kernels.base.Kernels`."""

    name = "torch"

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, weight_scale: Tensor | None = None
    ) -> Tensor:
        """Return x W^T + b; see `Kernels`. An int8 matrix is converted each time, which is slow."""
        if weight_scale is None:
            return F.linear(x, weight, bias)
        y = self.logits(x, weight, weight_scale)
        return (y if bias is None else y + bias).to(x.dtype)

    def logits(self, x: Tensor, weight: Tensor, weight_scale: Tensor | None = None) -> Tensor:
        """Return x W^T, at least in float32; see `Kernels`."""
        if weight_scale is not None:
            x = x.to(torch.promote_types(x.dtype, torch.bfloat16))  # sums with rows up to 127 pass float16's range
        y = F.linear(x, weight.to(x.dtype))
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        return y if weight_scale is None else y * weight_scale

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return (norm(x + residual), x + residual); see `Kernels`."""
        total = x if residual is None else x + residual
        precise = total.to(torch.promote_types(total.dtype, torch.float32))
        scale = torch.rsqrt(precise.pow(2).mean(-1, keepdim=True) + eps)
        return weight * (precise * scale).to(total.dtype), total

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Return silu(G) * U; see `Kernels`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def int8_scales(self, weight: Tensor) -> Tensor:
        """Return max |row| / 127 of each row; see `Kernels`."""
        return weight.abs().amax(1).float() / 127

    def int8_rows(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Return the rows over their scales, rounded; see `Kernels`."""
        divisors = scales.masked_fill(scales == 0, 1).unsqueeze(1)
        return (weight.float() / divisors).round_().clamp_(-127, 127).to(torch.int8)


TORCH_KERNELS: Kernels = TorchKernels()  # it has no state
