"""What a step's rows are sampled to: every combination of options follows its definition, and logprobs stay raw."""

import math
from collections.abc import Callable, Iterator
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.protocol.messages import SamplingParams
from engine.sampling.row import SamplingRow
from engine.sampling.sampler import sample
from engine.sampling.step import sample_step
from tests.sampling_oracle import adjust, chi_square_p_value, distribution

Tell = Callable[[str], None]

VOCAB_SIZE = 24
DRAWS = 4000
PROMPT, OUTPUT = [1, 2, 3, 3, 9, 20], [3, 4, 5, 5, 5, 11, 17]
OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.6},
    "top_k": {"top_k": 14},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.03},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "logit_bias": {"logit_bias": {4: 2.5, 7: -1.5, 12: 1.0, 13: -100.0}},
    "min_tokens": {"min_tokens": 8, "stop_token_ids": (0, 10)},
}
COMBINATIONS = list(chain.from_iterable(combinations(OPTIONS, size) for size in range(len(OPTIONS) + 1)))
FAMILY_LEVEL = 1e-3  # a right sampler would fail one of the combinations once in a thousand seeds


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors on a busy machine are several times as fast on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def row(**options: Any) -> SamplingRow:
    return SamplingRow(SamplingParams(**{"max_tokens": 99, **options}), PROMPT + OUTPUT, len(PROMPT))


def random_logits(num_rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 1.5


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])  # 3: any two options meet
def test_draws_of_combinations_of_options_follow_the_definition_in_float64(stride: int, tell: Tell) -> None:
    logits = random_logits()
    lowest = 1.0
    combinations = COMBINATIONS[::stride]
    for number, names in enumerate(combinations):
        options = {key: value for name in names for key, value in OPTIONS[name].items()}
        rows = [row(seed=number * DRAWS + draw, **options) for draw in range(DRAWS)]
        tokens, _ = sample_step(logits.repeat(DRAWS, 1), rows, sample)
        counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB_SIZE).tolist()
        p_value = chi_square_p_value(counts, distribution(adjust(logits[0].tolist(), rows[0]), rows[0].params))
        assert p_value > FAMILY_LEVEL / len(combinations), f"{names}: p = {p_value:.1e}"  # Bonferroni's correction
        lowest = min(lowest, p_value)
    tell(f"chi-square of {len(combinations)} combinations of options, {DRAWS} draws each: lowest p-value {lowest:.1e}")


@pytest.mark.parametrize("name", ["penalties", "logit_bias", "min_tokens"])
def test_the_definition_without_an_option_is_refuted_by_draws_with_it(name: str) -> None:
    """The check above can fail: each option moves the distribution by far more than chance."""
    logits = random_logits()
    tokens, _ = sample_step(logits.repeat(DRAWS, 1), [row(seed=draw, **OPTIONS[name]) for draw in range(DRAWS)], sample)
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB_SIZE).tolist()
    assert chi_square_p_value(counts, distribution(logits[0].tolist(), SamplingParams(max_tokens=99))) < 1e-12


def test_greedy_takes_the_largest_logit_after_bias_and_penalties() -> None:
    logits = torch.zeros(4, VOCAB_SIZE)
    logits[:, [5, 8, 10]] = torch.tensor([3.0, 2.5, 2.0])
    rows = [
        row(temperature=0.0),
        row(temperature=0.0, frequency_penalty=0.5),
        row(temperature=0.0, logit_bias={10: 1.5}),
        row(temperature=0.0, min_tokens=8, stop_token_ids=(5, 8)),
    ]
    assert sample_step(logits, rows, sample)[0] == [5, 8, 10, 10]


def test_a_row_whose_every_token_is_excluded_has_a_message_and_the_others_their_tokens() -> None:
    logits = torch.full((2, VOCAB_SIZE), -math.inf)
    logits[:, 6] = 1.0
    tokens, logprobs = sample_step(
        logits, [row(min_tokens=8, stop_token_ids=(6,), logprobs=2), row(logprobs=2)], sample
    )
    assert tokens[1] == 6
    assert "min_tokens" in str(tokens[0])
    assert list(logprobs) == [1]


def test_logprobs_are_those_of_the_models_own_logits_whatever_the_options() -> None:
    logits = random_logits()
    everything = {key: value for option in OPTIONS.values() for key, value in option.items()}
    tokens, logprobs = sample_step(logits, [row(logprobs=5, **everything)], sample)
    expected = logits[0].double().log_softmax(0)
    assert logprobs[0].token_id == tokens[0]
    assert logprobs[0].logprob == pytest.approx(expected[tokens[0]].item(), abs=1e-6)
    assert logprobs[0].top_token_ids == expected.topk(5).indices.tolist()
    assert logprobs[0].top_logprobs == pytest.approx(expected.topk(5).values.tolist(), abs=1e-6)


def test_only_rows_that_ask_have_logprobs_and_as_many_as_they_ask_for() -> None:
    rows = [row(logprobs=3), row(), row(logprobs=0, temperature=0.0), row(logprobs=1)]
    tokens, logprobs = sample_step(random_logits(4), rows, sample)
    assert {index: len(answer.top_token_ids) for index, answer in logprobs.items()} == {0: 3, 2: 0, 3: 1}
    assert [logprobs[index].token_id for index in (0, 2, 3)] == [tokens[0], tokens[2], tokens[3]]
    assert logprobs[2].rank == 1


def test_a_row_gives_the_same_beside_rows_with_options_and_alone() -> None:
    logits = random_logits(len(COMBINATIONS), seed=3)
    rows = [
        row(seed=i, logprobs=2, **{key: value for name in names for key, value in OPTIONS[name].items()})
        for i, names in enumerate(COMBINATIONS)
    ]
    tokens, logprobs = sample_step(logits, rows, sample)
    for i, of_row in enumerate(rows):
        assert sample_step(logits[i : i + 1], [of_row], sample) == ([tokens[i]], {0: logprobs[i]})
