"""The feed-forward layer, its intermediate features spread over the ranks."""

import torch
from torch import Tensor

from engine.communication.handler import CommunicationHandler
from engine.parallel.base import TensorParallelLayer, split_evenly
from engine.parallel.linear import ColumnParallelLinear, RowParallelLinear
from engine.protocol.model_config import ModelConfig


class ParallelMLP(TensorParallelLayer):
    """Y = (silu(X G) * (X U)) D: SwiGLU (Shazeer, 2020, arXiv 2002.05202).

    [G U] is one column-parallel layer, D a row-parallel one: one all-reduce for all. Intermediate features are padded
    to a multiple of the ranks; padding is 0 in G, U and D, and stays 0 in training, as all its gradients are 0.

    Args:
        config: the model.
        group: the ranks.
        device: where the parameters lie.
        dtype: their type.
    """

    def __init__(
        self, config: ModelConfig, group: CommunicationHandler, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(group)
        size, tp_size = config.intermediate_size, group.world_size
        self.gate_up_proj = ColumnParallelLinear(
            config.hidden_size,
            [split_evenly(size, tp_size, "gate_proj"), split_evenly(size, tp_size, "up_proj")],
            group,
            bias=config.mlp_bias,
            device=device,
            dtype=dtype,
        )
        self.down_proj = RowParallelLinear(
            split_evenly(size, tp_size), config.hidden_size, group, bias=config.mlp_bias, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[num_tokens, hidden_size]`, the same on all ranks, to the same shape on all ranks."""
        y: Tensor = self.down_proj(self.kernels.silu_mul(self.gate_up_proj(x)))
        return y
