"""What a step has to read and to compute, whatever computes it: the roof that its time is held against."""

from dataclasses import dataclass

import torch
from torch import nn

from engine.communication.handler import CommunicationHandler
from engine.models.registry import build_model
from engine.protocol.model_config import ModelConfig
from engine.worker.kv_tensors import block_bytes


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Of all ranks together."""

    read_bytes: int
    operations: int


@dataclass(frozen=True, kw_only=True)
class ModelCosts:
    """What steps pass of a model, on all ranks together: what several ranks hold, and padding, as often as it is there.

    A product with a matrix of n numbers is 2 n operations a token. Attention's products with keys and values are not
    counted, nor what norms and activations do.
    """

    weight_bytes: int  # that each step reads: all but the embedding, of which a step reads some rows
    embedding_row_bytes: int
    block_numbers: int  # in the matrices of all blocks, which every token passes
    head_numbers: int  # in the LM head, which a token passes where its logits are needed
    kv_token_bytes: int  # keys and values of one token

    @classmethod
    def of(cls, config: ModelConfig, tp_size: int, dtype: torch.dtype, quantization: str = "none") -> "ModelCosts":
        """Return them for a model on `tp_size` ranks, in `dtype`, its matrices as `--quantization` has them."""
        meta = torch.device("meta")
        place = CommunicationHandler.place(0, tp_size, meta)
        model = build_model(config, place, device=meta, dtype=dtype, quantization=quantization)
        embedding = model.model.embed_tokens.weight
        head = list(model.lm_head.parameters())
        blocks = list(model.model.layers.parameters())
        norm = list(model.model.norm.parameters())
        kv_heads = config.local_kv_heads(tp_size)
        return cls(
            weight_bytes=tp_size * sum(parameter.nbytes for parameter in (*blocks, *norm, *head)),
            embedding_row_bytes=config.hidden_size * embedding.itemsize,
            block_numbers=tp_size * _matrix_numbers(blocks),
            head_numbers=tp_size * _matrix_numbers(head),
            kv_token_bytes=tp_size * block_bytes(config, block_size=1, num_kv_heads=kv_heads, dtype=dtype),
        )

    def decode(self, sequences: int, context: float) -> StepCost:
        """Return the cost of a step in which sequences, each of `context` tokens with the new one, get a token each."""
        return self._step(tokens=sequences, logit_rows=sequences, kv_tokens=sequences * context)

    def prefill(self, tokens: int) -> StepCost:
        """Return the cost of computing one prompt, and the token that follows it."""
        return self._step(tokens=tokens, logit_rows=1, kv_tokens=tokens)

    def _step(self, *, tokens: int, logit_rows: int, kv_tokens: float) -> StepCost:
        return StepCost(
            read_bytes=round(self.weight_bytes + tokens * self.embedding_row_bytes + kv_tokens * self.kv_token_bytes),
            operations=2 * (tokens * self.block_numbers + logit_rows * self.head_numbers),
        )


def _matrix_numbers(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.ndim == 2)
