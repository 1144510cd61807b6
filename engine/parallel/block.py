"""One transformer layer."""

import torch
from torch import Tensor

from engine.attention.base import Attention
from engine.attention.rotary import Rotation
from engine.communication.handler import CommunicationHandler
from engine.parallel.attention import ParallelAttention
from engine.parallel.base import TensorParallelLayer
from engine.parallel.mlp import ParallelMLP
from engine.parallel.norm import RMSNorm
from engine.protocol.model_config import ModelConfig


class TensorParallelTransformerBlock(TensorParallelLayer):
    """H = X + attention(norm(X)), Y = H + mlp(norm(H)). Two all-reduces; X, H and Y are whole on every rank.

    The last addition is left to the next layer's norm, which reads both terms anyway: Y goes in and out as two terms,
    what came from the last MLP and the residual.

    Args:
        config: the model.
        layer_index: which layer's cache is used.
        group: the ranks.
        device: where the parameters lie.
        dtype: their type.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer_index: int,
        group: CommunicationHandler,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(group)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, group, device=device, dtype=dtype)
        self.self_attn = ParallelAttention(config, layer_index, group, device=device, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(
            config.hidden_size, config.rms_norm_eps, group, device=device, dtype=dtype
        )
        self.mlp = ParallelMLP(config, group, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, residual: Tensor | None, rotation: Rotation, attend: Attention
    ) -> tuple[Tensor, Tensor]:
        """Map the two terms of X, each `[num_tokens, hidden_size]`, to those of Y; None stands for zeros."""
        normed, x = self.input_layernorm(x, residual)
        normed, h = self.post_attention_layernorm(self.self_attn(normed, rotation, attend), x)
        return self.mlp(normed), h
