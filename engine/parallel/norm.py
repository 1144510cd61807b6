"""Normalisation, computed whole on every rank."""

import torch
from torch import Tensor

from engine.communication.handler import CommunicationHandler
from engine.parallel.base import ShardSpec, TensorParallelLayer


class RMSNorm(TensorParallelLayer):
    """y = w * h / sqrt(mean(h^2) + eps), h = x + residual (Zhang and Sennrich, 2019, arXiv 1910.07467).

    The mean is over the last dimension. Computed in float32 at least, and rounded to x's type before w multiplies, as
    published Llamas were trained.

    Args:
        size: of the last dimension.
        eps: keeps the root from 0.
        group: the ranks; all hold w.
        device: where the parameter lies.
        dtype: its type.
    """

    def __init__(
        self, size: int, eps: float, group: CommunicationHandler, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(group)
        self.eps = eps
        self.weight = self.create_parameter("weight", (size,), ShardSpec(), device=device, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (y, h), each of x's shape `[num_tokens, size]` and type; without a residual h is x."""
        return self.kernels.add_rms_norm(x, residual, self.weight, self.eps)
