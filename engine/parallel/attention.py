"""Self-attention whose heads are spread over the ranks."""

import torch
from torch import Tensor

from engine.attention.base import Attention
from engine.attention.rotary import Rotation
from engine.communication.handler import CommunicationHandler
from engine.parallel.base import ShardPart, TensorParallelLayer, split_evenly
from engine.parallel.linear import ColumnParallelLinear, RowParallelLinear
from engine.protocol.model_config import ModelConfig


class ParallelAttention(TensorParallelLayer):
    """Y = sum_h attend(X Q_h, X K_g(h), X V_g(h)) O_h, each rank with its own run of query heads h.

    Heads share keys and values in groups g (GQA). Where there are fewer KV heads than ranks, neighbouring ranks hold
    the same KV head. [Q K V] is one column-parallel layer, O a row-parallel one: one all-reduce for all.

    Args:
        config: the model.
        layer_index: which layer's cache is used.
        group: the ranks.
        device: where the parameters lie.
        dtype: their type.

    Raises:
        ValueError: when the heads cannot be spread over so many ranks.
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
        tp_size = group.world_size
        config.check_tensor_parallel_size(tp_size)
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads // tp_size
        kv_shards = min(tp_size, config.num_key_value_heads)
        self.num_kv_heads = config.num_key_value_heads // kv_shards
        q_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.qkv_proj = ColumnParallelLinear(
            config.hidden_size,
            [
                split_evenly(q_size, tp_size, "q_proj"),
                ShardPart("k_proj", kv_size, kv_size, kv_shards),
                ShardPart("v_proj", kv_size, kv_size, kv_shards),
            ],
            group,
            bias=config.qkv_bias,
            device=device,
            dtype=dtype,
        )
        self.o_proj = RowParallelLinear(
            split_evenly(q_size, tp_size),
            config.hidden_size,
            group,
            bias=config.o_bias,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor, rotation: Rotation, attend: Attention) -> Tensor:
        """Map `[num_tokens, hidden_size]`, the same on all ranks, to the same shape on all ranks."""
        heads = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        y: Tensor = self.o_proj(attend(self.layer_index, heads, rotation).flatten(1))
        return y
