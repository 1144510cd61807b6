"""Normalisation, computed whole on every rank."""

import torch
from torch import Tensor

from engine.communication.handler import CommunicationHandler
from engine.parallel.base import ShardSpec, TensorParallelLayer


class RMSNorm(TensorParallelLayer):
    """y = w * x / sqrt(mean(x^2) + eps), over the last dimension (Zhang and Sennrich, 2019, arXiv 1910.07467).

    Computed in float32 at least, and rounded to x's type before w multiplies, as published Llamas were trained.

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

    def forward(self, x: Tensor) -> Tensor:
        """Map `[num_tokens, size]` to the same shape and type."""
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(precise.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (precise * scale).to(x.dtype)
