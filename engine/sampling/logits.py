"""A row's logits as its options make them, before a token is chosen.

In vLLM's order, with x a token's logit:

    logit_bias            x + bias
    min_tokens            -inf, for stop tokens while fewer tokens were sampled
    repetition_penalty    x / penalty where x > 0, x * penalty elsewhere, for tokens of the prompt or the output
                          (Keskar et al., "CTRL", arXiv 1909.05858)
    frequency_penalty     x - penalty * how often the output holds the token
    presence_penalty      x - penalty, for tokens of the output

Only the logits that change are touched, so a row that asks for nothing costs nothing, and the model's own logits, which
log-probabilities are made of, need no copy.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor

from engine.sampling.row import SamplingRow
from engine.sampling.vocabulary import to_index

Amounts = Mapping[int, float]  # by token id: what an option does to its logit


@contextmanager
def adjusted(logits: Tensor, rows: Sequence[SamplingRow]) -> Iterator[None]:
    """In the block `logits` are as the rows' options make them, after it they are the model's own again.

    Args:
        logits: `[num_rows, vocab_size]` float32, changed in place and restored.
        rows: one for each; all token ids are below `vocab_size`.
    """
    changed = []
    for amounts_of, apply in _OPTIONS:
        amounts = [amounts_of(row) for row in rows]
        if any(amounts):
            entries = _entries(amounts, logits.device)
            before = logits[entries]
            changed.append((entries, before))
            values = torch.tensor(list(chain.from_iterable(of_row.values() for of_row in amounts)), dtype=logits.dtype)
            logits[entries] = apply(before, values.to(logits.device))
    try:
        yield
    finally:
        for entries, before in reversed(changed):
            logits[entries] = before


def _entries(amounts: Sequence[Amounts], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return row and token id of each amount."""
    counts = torch.tensor([len(of_row) for of_row in amounts])
    return torch.repeat_interleave(counts).to(device), to_index(list(chain.from_iterable(amounts)), device)


def _biases(row: SamplingRow) -> Amounts:
    return row.params.logit_bias


def _exclusions(row: SamplingRow) -> Amounts:
    if row.num_output_tokens >= row.params.min_tokens:
        return {}
    return dict.fromkeys(row.params.stop_token_ids, -torch.inf)


def _repetition_penalties(row: SamplingRow) -> Amounts:
    if row.params.repetition_penalty == 1:
        return {}
    return dict.fromkeys(row.token_ids, row.params.repetition_penalty)


def _output_penalties(row: SamplingRow) -> Amounts:
    """Return what frequency and presence penalty take together."""
    frequency, presence = row.params.frequency_penalty, row.params.presence_penalty
    if frequency == presence == 0:
        return {}
    counts = Counter(row.token_ids[row.num_prompt_tokens :])
    return {token_id: frequency * count + presence for token_id, count in counts.items()}


def _scale_down(logits: Tensor, penalties: Tensor) -> Tensor:
    return torch.where(logits > 0, logits / penalties, logits * penalties)


_OPTIONS: tuple[tuple[Callable[[SamplingRow], Amounts], Callable[[Tensor, Tensor], Tensor]], ...] = (
    (_biases, torch.add),
    (_exclusions, torch.add),
    (_repetition_penalties, _scale_down),
    (_output_penalties, torch.sub),
)
