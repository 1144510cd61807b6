"""Token embedding and LM head, cut over the vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.communication.handler import CommunicationHandler
from engine.parallel.base import ShardSpec, TensorParallelLayer, split_evenly
from engine.parallel.collectives import copy_to_group, reduce_from_group


class VocabParallelEmbedding(TensorParallelLayer):
    """Y = E[ids] with the rows of E cut: E = [E_1; ...; E_p], and Y = sum_i E_i[ids], where E_i is 0 outside its rows.

    Args:
        vocab_size: rows of E, padded with zeros to a multiple of the ranks.
        hidden_size: columns of E.
        group: the ranks.
        device: where the parameter lies.
        dtype: its type.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        group: CommunicationHandler,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(group)
        part = split_evenly(vocab_size, group.world_size)
        self.first_id = group.rank * part.local_size
        shape = (part.local_size, hidden_size)
        self.weight = self.create_parameter("weight", shape, ShardSpec(0, (part,)), device=device, dtype=dtype)
        self.weight_scale: nn.Parameter | None = None
        self.dtype = dtype

    def forward(self, token_ids: Tensor) -> Tensor:
        """Map ids `[num_tokens]`, each in `0 <= id < vocab_size`, to `[num_tokens, hidden_size]` on every rank."""
        if self.group.world_size == 1:
            return self._rows(token_ids)
        local_ids = token_ids - self.first_id
        elsewhere = (local_ids < 0) | (local_ids >= self.weight.shape[0])
        rows = self._rows(local_ids.masked_fill(elsewhere, 0))
        return reduce_from_group(rows.masked_fill(elsewhere.unsqueeze(-1), 0), self.group)

    def _rows(self, local_ids: Tensor) -> Tensor:
        rows = F.embedding(local_ids, self.weight)
        if self.weight_scale is None:
            return rows
        return (rows * self.weight_scale[local_ids].unsqueeze(-1)).to(self.dtype)


class ParallelLMHead(TensorParallelLayer):
    """Y = X E^T with the rows of E cut as in `VocabParallelEmbedding`: rank i returns Y_i = X E_i^T.

    The ranks' logits in rank order are those of all token ids, then those of the padding, which are 0 and must be cut
    off at `vocab_size` before anything is chosen.

    Args:
        embedding: the layer whose shape this one takes, and with `tied` its parameter.
        tied: whether E is the embedding's.
    """

    def __init__(self, embedding: VocabParallelEmbedding, *, tied: bool) -> None:
        super().__init__(embedding.group)
        self.weight_scale: nn.Parameter | None = None
        spec, weight = embedding.shard_specs["weight"], embedding.weight
        if tied:
            self.shard_specs["weight"] = spec
            self.weight = weight
        else:
            shape = tuple(weight.shape)
            self.weight = self.create_parameter("weight", shape, spec, device=weight.device, dtype=weight.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[num_rows, hidden_size]`, the same on all ranks, to this rank's logits `[num_rows, local_vocab]`.

        They are float32 at least, whatever the model's type.
        """
        return self.kernels.logits(copy_to_group(hidden, self.group), self.weight, self.weight_scale)
