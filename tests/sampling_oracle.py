"""The sampler's definition in Python's floats, one token at a time: what the engine's tensors are held to.

Logits computed in float32 are off by a little. `play` says by how much, in units of a logit: what lies within it of the
best, or of a filter's border, may be decided either way.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch

from engine.protocol.messages import SamplingParams
from engine.sampling.philox import noise_source, vocabulary_noise
from engine.sampling.row import SamplingRow


def adjust(logits: Sequence[float], row: SamplingRow) -> list[float]:
    """Return the logits after bias, min_tokens and penalties, in vLLM's order."""
    params = row.params
    seen, counts = set(row.token_ids), Counter(row.token_ids[row.num_prompt_tokens :])
    adjusted = []
    for token, logit in enumerate(logits):
        value = logit + params.logit_bias.get(token, 0.0)
        if token in params.stop_token_ids and counts.total() < params.min_tokens:
            value = -math.inf
        if token in seen:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * counts[token]
        value -= params.presence_penalty if token in counts else 0.0
        adjusted.append(value)
    return adjusted


def kept_tokens(logits: Sequence[float], params: SamplingParams, play: float = 0.0) -> list[int]:
    """Return the tokens that min_p, top_k and top_p keep, the likeliest first.

    With `play` above 0: all that logits as far off may keep; below 0: those that any such logits keep.
    """
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if params.temperature == 0:  # greedy: filters change nothing
        return order
    values = [logits[token] for token in order]
    floor = values[0] + params.temperature * math.log(params.min_p) if params.min_p > 0 else -math.inf
    values = [value for value in values if value >= floor - play]
    values = values[: _move_border(values, params.top_k or len(values), play)]
    weights = [math.exp((value - values[0]) / params.temperature) for value in values]
    goal = (params.top_p + play / params.temperature) * sum(weights)
    reached, count = 0.0, 0
    while count < len(values) and reached < goal:
        reached += weights[count]
        count += 1
    return order[: _move_border(values, count, play)]


def _move_border(falling: list[float], count: int, play: float) -> int:
    """Return how many of `falling` are kept by a filter that keeps `count`, if values are off by `play`."""
    if play == 0 or not 0 < count < len(falling):
        return count
    last_kept, first_dropped = falling[count - 1], falling[count]
    if play > 0:
        return sum(value >= last_kept - play for value in falling)
    return sum(value > first_dropped - play for value in falling)


def distribution(logits: Sequence[float], params: SamplingParams) -> list[float]:
    """Return each token's probability: the softmax of what the filters keep."""
    kept = kept_tokens(logits, params)
    weights = {token: math.exp((logits[token] - logits[kept[0]]) / params.temperature) for token in kept}
    total = sum(weights.values())
    return [weights.get(token, 0.0) / total for token in range(len(logits))]


def possible_tokens(logits: Sequence[float], params: SamplingParams, position: int, play: float = 0.0) -> set[int]:
    """Return what Gumbel-max may draw at `position` from logits that are off by `play`: without any, one token.

    That are the tokens that may be kept and whose logit plus noise is within `play` of the best that is surely kept.
    """
    source = noise_source([params.seed], [params.choice_index], [position], torch.device("cpu"))
    noise = vocabulary_noise(source, len(logits))[0].tolist()
    scores = [logit + params.temperature * gumbel for logit, gumbel in zip(logits, noise, strict=True)]
    best = max((scores[token] for token in kept_tokens(logits, params, -play)), default=-math.inf)
    return {token for token in kept_tokens(logits, params, play) if scores[token] >= best - play}


def chi_square_p_value(counts: Sequence[int], shares: Sequence[float]) -> float:
    """Return how often draws from `shares` are as far from them as `counts`: Pearson's chi-square.

    Cells that are expected fewer than five times are counted as one. A cell that cannot be drawn must be empty.
    """
    total = sum(counts)
    assert all(count == 0 for count, share in zip(counts, shares, strict=True) if share == 0)
    cells = [(count, share * total) for count, share in zip(counts, shares, strict=True)]
    common = [cell for cell in cells if cell[1] >= 5]
    rare = [cell for cell in cells if cell[1] < 5]
    rare_expected = sum(expected for _, expected in rare)
    if rare_expected >= 5:
        common.append((sum(count for count, _ in rare), rare_expected))
    assert len(common) > 1, "nothing to compare: one token has it all"
    statistic = sum((count - expected) ** 2 / expected for count, expected in common)
    halves = torch.tensor([(len(common) - 1) / 2, statistic / 2], dtype=torch.float64)
    p_value: float = torch.special.gammaincc(*halves).item()
    return p_value
