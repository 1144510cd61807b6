"""Chooses the next token of each row from its logits.

A row whose temperature is 0 takes its largest logit. Any other row is filtered, in vLLM's order, and drawn from:

    s_i   = (logit_i - max logit) / temperature                    so that exp(s_i) is the probability over the largest
    min_p   keeps s_i >= log(min_p)
    top_k   keeps the k largest
    top_p   keeps the fewest of the largest whose share of what min_p and top_k left reaches top_p
    token = argmax over what is kept of s_i + g_i                  Gumbel-max: a draw from softmax(s)

with g_i from `engine.sampling.philox`, a function of (seed, choice, position, token id) alone. Ties are decided for the
lower token id everywhere. The mass that top_p adds up is exp(s) in integers, and made by operations that every device
rounds alike, so a row's result depends neither on the order of summation, nor on the device, nor on the other rows:

    n = round(s log2(e))      r = s - n log(2)      exp(s) = 2^n (1 + r + r^2 / 2! + … + r^7 / 7!)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.protocol.messages import SamplingParams
from engine.sampling.philox import TOKENS_PER_COUNTER, NoiseSource, noise_source, token_noise, vocabulary_noise
from engine.sampling.vocabulary import chunks, largest, rows_per_pass, to_index

# Tokens ranked before the whole vocabulary is: enough for common top_k, and for top_p on all but flat distributions.
NUM_CANDIDATES = 1024
# exp(s) = 1 as an integer: the sum over a vocabulary of 2^20 still fits an int64.
MASS_ONE = 2.0**42
MASSLESS = -40.0  # exp(s) is 0 as an integer for this score and all below it
LOG2_E = 1.4426950216293335  # log2(e) as a float32, and log(2) in two of them: n times the first has no rounding error
LOG_2 = (0.693359375, -0.00021219444170128554)
NOT_FINITE, ALL_EXCLUDED = -1, -2  # instead of a token
SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny


class SamplingError(ValueError):
    """No token can be drawn for a row: its logits hold NaN or +inf, or nothing but -inf."""


# What `sample` is, and whatever else draws the same tokens.
Sampler = Callable[[Tensor, Sequence[SamplingParams], Sequence[int]], list[int | SamplingError]]


def sample(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int | SamplingError]:
    """Return the next token of each row, or the error of a row that has none; errors do not touch other rows.

    Args:
        logits: `[num_rows, vocab_size]` float32, on any device; -inf where a token is forbidden. Not changed.
        params: how each row is sampled; the seeds are below 2^64.
        positions: index of the token being sampled in its sequence: prompt length plus number of tokens since.
    """
    assert logits.dtype == torch.float32
    assert len(params) == len(positions) == logits.shape[0]
    maxima, tokens = logits.max(dim=1)
    drawn = [row for row, param in enumerate(params) if param.temperature > 0]
    for chunk in chunks(drawn, rows_per_pass(logits)):
        batch = _Batch.of(logits, maxima, [params[row] for row in chunk], [positions[row] for row in chunk], chunk)
        tokens[to_index(chunk, logits.device)] = _draw(batch)
    tokens.masked_fill_(~maxima.isfinite(), NOT_FINITE).masked_fill_(maxima == -math.inf, ALL_EXCLUDED)
    return [token_or_error(token) for token in tokens.tolist()]


def token_or_error(token: int) -> int | SamplingError:
    """Return the error that stands behind `NOT_FINITE` and `ALL_EXCLUDED`, and any other token as it is."""
    if token == NOT_FINITE:
        return SamplingError("the logits hold NaN or infinity: no token can be sampled")
    if token == ALL_EXCLUDED:
        return SamplingError("every token is excluded: by the model, or as a stop token before min_tokens")
    return token


def _column(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype).to(device).unsqueeze(1)


@dataclass(frozen=True)
class _Batch:
    """Rows that are drawn, with temperature and min_p applied."""

    scores: Tensor  # [num_rows, vocab_size] float32: s of the module's docstring, -inf where min_p removed a token
    params: list[SamplingParams]
    noise: NoiseSource

    @classmethod
    def of(
        cls, logits: Tensor, maxima: Tensor, params: list[SamplingParams], positions: list[int], rows: Sequence[int]
    ) -> "_Batch":
        device = logits.device
        index = to_index(rows, device)
        temperatures = _column([max(param.temperature, SMALLEST_TEMPERATURE) for param in params], device)
        scores = (logits[index] - maxima[index].unsqueeze(1)).div_(temperatures)
        if any(param.min_p > 0 for param in params):
            floors = [math.log(min(param.min_p, 1.0)) if param.min_p > 0 else -math.inf for param in params]
            scores.masked_fill_(scores < _column(floors, device), -math.inf)
        seeds, choices = [param.seed for param in params], [param.choice_index for param in params]
        return cls(scores, params, noise_source(seeds, choices, positions, device))

    @property
    def vocab_size(self) -> int:
        return self.scores.shape[1]

    def select(self, rows: list[int]) -> "_Batch":
        if len(rows) == len(self.params):
            return self
        index = to_index(rows, self.scores.device)
        return _Batch(self.scores[index], [self.params[row] for row in rows], self.noise.rows(index))

    def top_ps(self) -> Tensor:
        return _column([min(param.top_p, 1.0) for param in self.params], self.scores.device, torch.float64)

    def top_k(self, row: int) -> int:
        """Return how many of the row's largest may be kept; the vocabulary size where top_k is off."""
        top_k = self.params[row].top_k
        return top_k if 0 < top_k < self.vocab_size else self.vocab_size

    def is_ranked(self, row: int) -> bool:
        """Whether the row's filters need its tokens in order."""
        return self.top_k(row) < self.vocab_size or self.params[row].top_p < 1


def _draw(batch: _Batch) -> Tensor:
    """Return a token for each row, `[num_rows]`."""
    unranked = [row for row in range(len(batch.params)) if not batch.is_ranked(row)]
    ranked = [row for row in range(len(batch.params)) if batch.is_ranked(row)]
    tokens = torch.empty(len(batch.params), dtype=torch.int64, device=batch.scores.device)
    if unranked:
        tokens[to_index(unranked, tokens.device)] = _draw_from_all(batch.select(unranked))
    if ranked:
        tokens[to_index(ranked, tokens.device)] = _draw_from_top(batch.select(ranked))
    return tokens


def _draw_from_all(batch: _Batch) -> Tensor:
    return vocabulary_noise(batch.noise, batch.vocab_size).add_(batch.scores).argmax(dim=1)


def _draw_from_top(batch: _Batch) -> Tensor:
    """Draw with top_k and top_p from the candidates, and rank all tokens just for the rows that need more of them."""
    widest = max(batch.top_k(row) for row in range(len(batch.params)))
    ranking = _Ranking.of(batch, min(widest, NUM_CANDIDATES))
    tokens = ranking.draw()
    short = ranking.rows_cut_short()
    if short:
        wider = batch.select(short)
        tokens[to_index(short, tokens.device)] = _Ranking.of(wider, wider.vocab_size).draw()
    return tokens


@dataclass(frozen=True)
class _Ranking:
    """The `width` largest tokens of each row in order, and how many of them the row's filters keep."""

    batch: _Batch
    ids: Tensor  # [num_rows, width] int64
    num_kept: list[int]  # of each row: the first so many
    is_complete: list[bool]  # of each row: no token beyond the width would be kept

    @classmethod
    def of(cls, batch: _Batch, width: int) -> "_Ranking":
        device = batch.scores.device
        top_ks = [batch.top_k(row) for row in range(len(batch.params))]
        ids = largest(batch.scores, width)
        within_top_k = torch.arange(width, device=device) < to_index(top_ks, device).unsqueeze(1)
        mass = _mass(batch.scores.gather(1, ids)).mul_(within_top_k)
        reached = mass.cumsum(1)
        goal = _total_mass(batch, reached, top_ks) * batch.top_ps()
        num_kept = ((reached - mass < goal) & within_top_k).sum(1)
        all_kept_here = reached[:, -1] >= goal.squeeze(1)
        counts, enough = torch.stack((num_kept, all_kept_here)).tolist()  # one transfer from the device
        is_complete = [
            top_k <= width or (top_k == batch.vocab_size and bool(reaches))
            for top_k, reaches in zip(top_ks, enough, strict=True)
        ]
        return cls(batch, ids, [max(count, 1) for count in counts], is_complete)

    def draw(self) -> Tensor:
        """Return a token for each row; not meaningful for rows that are not complete."""
        ids = self.ids[:, : max(self.num_kept)]
        is_kept = torch.arange(ids.shape[1], device=ids.device) < to_index(self.num_kept, ids.device).unsqueeze(1)
        scores = self._noise(ids).add_(self.batch.scores.gather(1, ids)).masked_fill_(~is_kept, -math.inf)
        return ids.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)

    def _noise(self, ids: Tensor) -> Tensor:
        """Return the noise of `ids` by the cheaper way: a counter for each id, or each counter of the vocabulary."""
        if ids.shape[1] < self.batch.vocab_size // TOKENS_PER_COUNTER:
            return token_noise(self.batch.noise, ids)
        return vocabulary_noise(self.batch.noise, self.batch.vocab_size).gather(1, ids)

    def rows_cut_short(self) -> list[int]:
        return [row for row, complete in enumerate(self.is_complete) if not complete]


def _total_mass(batch: _Batch, reached: Tensor, top_ks: list[int]) -> Tensor:
    """Return the mass of what min_p and top_k keep, `[num_rows, 1]`, of which `reached` counts the largest tokens."""
    total = reached[:, -1:].clone()
    beyond = [row for row, top_k in enumerate(top_ks) if top_k > reached.shape[1]]
    if beyond:
        total[to_index(beyond, total.device)] = _mass(batch.select(beyond).scores).sum(1, keepdim=True)
    return total


def _mass(scores: Tensor) -> Tensor:
    """Return `exp(scores)` as integers, of which sums are exact in any order.

    Each operation rounds once, to float32; none may be fused with another.
    """
    s = scores.clamp(min=MASSLESS)
    n = (s * LOG2_E).round_()
    r = s.sub_(n * LOG_2[0]).sub_(n * LOG_2[1])
    series = torch.full_like(r, 1 / math.factorial(7))
    for order in range(6, -1, -1):
        series.mul_(r).add_(1 / math.factorial(order))
    return series.to(torch.float64).mul_(MASS_ONE).to(torch.int64) >> n.neg_().to(torch.int64)
