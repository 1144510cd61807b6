"""Torch's operations: differentiable, and on every device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.base import Kernels


class TorchKernels:
    """See `engine.kernels.base.Kernels`."""

    name = "torch"

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + b; see `Kernels`."""
        return F.linear(x, weight, bias)

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x W^T, at least in float32; see `Kernels`."""
        y = F.linear(x, weight)
        return y.to(torch.promote_types(y.dtype, torch.float32))

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


TORCH_KERNELS: Kernels = TorchKernels()  # it has no state
