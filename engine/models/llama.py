"""Llama (Touvron et al., 2023, arXiv 2302.13971), and the models that compute the same."""

import torch
from torch import Tensor, nn

from engine.attention.base import Attention
from engine.attention.rotary import RotaryEmbedding
from engine.communication.handler import CommunicationHandler
from engine.parallel.block import TensorParallelTransformerBlock
from engine.parallel.embedding import ParallelLMHead, VocabParallelEmbedding
from engine.parallel.norm import RMSNorm
from engine.protocol.model_config import ModelConfig


class LlamaModel(nn.Module):
    """Embedding, blocks, and the last norm; its modules are named as in the checkpoint."""

    def __init__(
        self, config: ModelConfig, group: CommunicationHandler, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, group, device=device, dtype=dtype
        )
        self.layers = nn.ModuleList(
            TensorParallelTransformerBlock(config, index, group, device=device, dtype=dtype)
            for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, group, device=device, dtype=dtype)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope, device=device, dtype=dtype)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attention) -> Tensor:
        """Map ids and positions, each `[num_tokens]`, to `[num_tokens, hidden_size]`."""
        x: Tensor = self.embed_tokens(token_ids)
        residual: Tensor | None = None
        rotation = self.rotary(positions)
        for layer in self.layers:
            x, residual = layer(x, residual, rotation, attend)
        normed: Tensor = self.norm(x, residual)[0]
        return normed


class LlamaForCausalLM(nn.Module):
    """One rank's shard of a Llama. Parameters are uninitialised until a checkpoint is loaded into them.

    Args:
        config: the model.
        group: the ranks that it is split over.
        device: where the parameters lie.
        dtype: their type, and that of the arithmetic.

    Raises:
        ValueError: when the model cannot be split over so many ranks.
    """

    def __init__(
        self, config: ModelConfig, group: CommunicationHandler, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.model = LlamaModel(config, group, device=device, dtype=dtype)
        self.lm_head = ParallelLMHead(self.model.embed_tokens, tied=config.tie_word_embeddings)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attention) -> Tensor:
        """Return the final hidden states, the same on every rank.

        Args:
            token_ids: `[num_tokens]`, the step's sequences one after the other.
            positions: `[num_tokens]`, of each token in its sequence.
            attend: computes attention among the step's tokens and what is cached.

        Returns:
            `[num_tokens, hidden_size]`, after the last norm.
        """
        hidden: Tensor = self.model(token_ids, positions, attend)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states `[num_rows, hidden_size]` to this rank's logits `[num_rows, local_vocab]`.

        The ranks' logits, concatenated in rank order, are cut off at `vocab_size`: what follows is padding.
        """
        logits: Tensor = self.lm_head(hidden)
        return logits
