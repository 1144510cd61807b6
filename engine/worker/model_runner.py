"""Turns a scheduled step into tensors and runs this rank's shard on them."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice

import torch
from torch import Tensor

from engine.attention.base import Attention, AttentionBackend, AttentionMetadata
from engine.attention.rotary import Rotation
from engine.communication.handler import CommunicationHandler
from engine.models.llama import LlamaForCausalLM
from engine.protocol.messages import ScheduledRow, ScheduledStep, TokenLogprobs
from engine.sampling.logprobs import LogprobQuery, compute_logprobs
from engine.sampling.vocabulary import chunks

# Logits of the prompt that a rank holds at a time: 64 MiB in float32.
PROMPT_LOGITS_SIZE = 1 << 24


@dataclass
class _Sequence:
    """What a rank knows of a sequence, from the steps it has seen."""

    token_ids: list[int] = field(default_factory=list)
    block_ids: "array[int]" = field(default_factory=lambda: array("i"))


@dataclass(frozen=True)
class RunnerOutput:
    """What rank 0 learns from a step; the other ranks learn nothing."""

    logits: Tensor | None  # float32 `[num_sampling_rows, vocab_size]`, in batch order; None when no row samples
    prompt_logprobs: dict[str, list[TokenLogprobs]]  # by request id, of the rows that ask


class ModelRunner:
    """Runs steps in the order they were scheduled; every rank's runner sees the same steps.

    Args:
        model: this rank's shard.
        attention: over this rank's cache.
        group: the ranks.
        vocab_size: of the model, without padding.
        device: where the model lies.
        note_progress: is called whenever a step has got further, by a layer or so.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        attention: AttentionBackend,
        group: CommunicationHandler,
        *,
        vocab_size: int,
        device: torch.device,
        note_progress: Callable[[], None],
    ) -> None:
        self._model = model
        self._attention = attention
        self._group = group
        self._vocab_size = vocab_size
        self._device = device
        self._note_progress = note_progress
        self._sequences: dict[str, _Sequence] = {}

    @torch.inference_mode()
    def run(self, step: ScheduledStep) -> RunnerOutput:
        """Compute a step."""
        for request_id in step.finished:
            self._sequences.pop(request_id, None)
        sequences = [self._update(row) for row in step.rows]
        token_ids, positions = self._inputs(step.rows, sequences)
        metadata = _metadata(step.rows, sequences)
        hidden = self._model(token_ids, positions, self._attend(metadata))
        last = [end - 1 for end, row in zip(metadata.cu_seqlens_q[1:], step.rows, strict=True) if row.samples]
        return RunnerOutput(
            logits=self._gather_logits(hidden[last]) if last else None,
            prompt_logprobs=self._prompt_logprobs(step.rows, sequences, metadata.cu_seqlens_q, hidden),
        )

    def _attend(self, metadata: AttentionMetadata) -> Attention:
        """Return the step's attention, which each layer calls once."""
        attend, note_progress = self._attention(metadata), self._note_progress

        def attend_and_note(layer_index: int, heads: Tensor, rotation: Rotation) -> Tensor:
            attended = attend(layer_index, heads, rotation)
            note_progress()
            return attended

        return attend_and_note

    def _gather_logits(self, hidden: Tensor) -> Tensor | None:
        logits = self._group.gather(self._model.compute_logits(hidden))
        return None if logits is None else logits[:, : self._vocab_size].float()

    def _prompt_logprobs(
        self, rows: list[ScheduledRow], sequences: list[_Sequence], starts: list[int], hidden: Tensor
    ) -> dict[str, list[TokenLogprobs]]:
        """Return the log-probabilities of the tokens that follow the positions asked for; nothing on other ranks."""
        queries: list[LogprobQuery] = []
        counts: dict[str, int] = {}
        for row, sequence, start in zip(rows, sequences, starts[:-1], strict=True):
            if (wanted := row.prompt_logprobs) is not None:
                shift = start - row.num_computed_tokens
                targets = sequence.token_ids[wanted.start + 1 : wanted.stop + 1]
                queries += [
                    LogprobQuery(shift + position, target, wanted.num_top)
                    for position, target in enumerate(targets, start=wanted.start)
                ]
                counts[row.request_id] = len(targets)
        answers = iter(self._answer(queries, hidden))
        if self._group.rank != 0:
            return {}
        return {request_id: list(islice(answers, count)) for request_id, count in counts.items()}

    def _answer(self, queries: Sequence[LogprobQuery], hidden: Tensor) -> list[TokenLogprobs]:
        """Return the answers to queries of rows of `hidden`, a bounded number of rows at a time."""
        local_vocab_size = -(-self._vocab_size // self._group.world_size)
        answers: list[TokenLogprobs] = []
        for chunk in chunks(queries, max(1, PROMPT_LOGITS_SIZE // local_vocab_size)):
            logits = self._model.compute_logits(hidden[[query.row for query in chunk]])
            self._note_progress()
            of_chunk = [query._replace(row=index) for index, query in enumerate(chunk)]
            answers += compute_logprobs(logits, of_chunk, self._group, vocab_size=self._vocab_size)
        return answers

    def _update(self, row: ScheduledRow) -> _Sequence:
        if row.is_new:
            self._sequences[row.request_id] = _Sequence()
        sequence = self._sequences[row.request_id]
        sequence.token_ids.extend(row.new_token_ids)
        sequence.block_ids.extend(row.new_block_ids)
        return sequence

    def _inputs(self, rows: list[ScheduledRow], sequences: list[_Sequence]) -> tuple[Tensor, Tensor]:
        """Return token ids and positions, each `[num_tokens]`."""
        token_ids: list[int] = []
        positions: list[int] = []
        for row, sequence in zip(rows, sequences, strict=True):
            stop = row.num_computed_tokens + row.num_scheduled_tokens
            token_ids.extend(sequence.token_ids[row.num_computed_tokens : stop])
            positions.extend(range(row.num_computed_tokens, stop))
        return self._tensor(token_ids), self._tensor(positions)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _metadata(rows: list[ScheduledRow], sequences: list[_Sequence]) -> AttentionMetadata:
    return AttentionMetadata(
        cu_seqlens_q=[0, *accumulate(row.num_scheduled_tokens for row in rows)],
        seq_lens=[row.num_computed_tokens + row.num_scheduled_tokens for row in rows],
        block_tables=[sequence.block_ids for sequence in sequences],
    )
