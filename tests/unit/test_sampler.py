"""The sampler: its distribution, its filters, its ties, and that a row depends on nothing but itself."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.protocol.messages import SamplingParams
from engine.sampling.sampler import SamplingError, sample
from tests.sampling_oracle import chi_square_p_value, distribution, kept_tokens

DRAWS = 20_000
CHANCE = 1e-4  # how often a right sampler would fail a check of its counts
# Filters of every kind, alone and together; each is used over a small vocabulary and over a large one.
FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"temperature": 1.7, "top_k": 6, "top_p": 0.8},
    {"temperature": 0.8, "min_p": 0.02, "top_k": 9, "top_p": 0.95},
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors on a busy machine are several times as fast on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def params(**overrides: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1, **overrides})


def draw(logits: Tensor, param: SamplingParams, position: int = 1) -> int:
    token = sample(logits.unsqueeze(0), [param], [position])[0]
    assert isinstance(token, int)
    return token


def random_logits(num_rows: int, vocab_size: int, seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def check_counts(counts: Sequence[int], shares: Sequence[float]) -> None:
    assert chi_square_p_value(counts, shares) > CHANCE


@pytest.mark.parametrize("filters", FILTERS)
def test_draws_over_many_positions_follow_the_filtered_softmax(filters: dict[str, Any]) -> None:
    logits = random_logits(1, 24, seed=3, scale=1.5)
    param = params(seed=99, **filters)
    tokens = sample(logits.expand(DRAWS, -1), [param] * DRAWS, list(range(DRAWS)))
    counts = torch.bincount(torch.tensor(tokens), minlength=24).tolist()
    check_counts(counts, distribution(logits[0].tolist(), param))


@pytest.mark.parametrize("varied", ["seed", "choice_index"])
def test_draws_over_many_seeds_and_choices_follow_the_softmax(varied: str) -> None:
    logits = random_logits(1, 24, seed=4, scale=1.5)
    tokens = sample(logits.expand(DRAWS, -1), [params(**{varied: i}) for i in range(DRAWS)], [1] * DRAWS)
    counts = torch.bincount(torch.tensor(tokens), minlength=24).tolist()
    check_counts(counts, distribution(logits[0].tolist(), params()))


@pytest.mark.parametrize(
    "filters",
    [{"top_p": 0.9}, {"top_k": 2500}, {"top_k": 2500, "top_p": 0.6}, {"top_k": 1200, "top_p": 0.4}, {"top_k": 1000}],
)
def test_filters_that_keep_more_than_the_candidates_follow_the_filtered_softmax(filters: dict[str, Any]) -> None:
    """4,000 tokens, nearly flat, of which more than a thousand are kept; counted in 20 groups by likelihood."""
    draws = 2000
    logits = random_logits(1, 4000, seed=5, scale=0.5)
    param = params(seed=1, **filters)
    tokens = sample(logits.expand(draws, -1), [param] * draws, list(range(draws)))
    expected = torch.tensor(distribution(logits[0].tolist(), param))
    order = expected.argsort(descending=True)
    group = torch.empty(4000, dtype=torch.int64)
    group[order] = torch.arange(4000) // 200
    drawn = torch.tensor(tokens)
    counts = torch.bincount(group[drawn], minlength=20).tolist()
    shares = torch.zeros(20).index_add(0, group, expected).tolist()
    assert expected[drawn].min() > 0
    check_counts(counts, shares)


def test_temperature_0_takes_the_largest_logit_and_the_lowest_id_of_equals() -> None:
    logits = torch.zeros(2, 5000)
    logits[0, [4321, 17, 4999]] = 2.5
    assert sample(logits, [params(temperature=0.0)] * 2, [1, 1]) == [17, 0]


def test_greedy_ignores_filters_and_seed() -> None:
    logits = random_logits(1, 100, seed=1)[0]
    greedy = params(temperature=0.0, top_k=3, top_p=0.1, min_p=0.5, seed=5, choice_index=2)
    assert draw(logits, greedy) == int(logits.argmax())


@pytest.mark.parametrize(
    "filters", [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-5}]
)
def test_the_tightest_filters_leave_the_largest_logit(filters: dict[str, Any]) -> None:
    logits = random_logits(50, 300, seed=2)
    tokens = sample(logits, [params(seed=i, **filters) for i in range(50)], [3] * 50)
    assert tokens == logits.argmax(dim=1).tolist()


def test_top_k_takes_the_lower_ids_of_equals_at_its_border() -> None:
    logits = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    tokens = {draw(logits, params(top_k=4, seed=seed)) for seed in range(300)}
    assert tokens == {0, 1, 2, 3}


def test_zero_and_minus_zero_are_equals() -> None:
    logits = torch.tensor([0.0, -0.0, -0.0, 0.0])
    tokens = {draw(logits, params(top_k=2, seed=seed)) for seed in range(100)}
    assert tokens == {0, 1}


def test_top_p_keeps_the_token_that_crosses_it_and_none_that_follows() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    for top_p, kept in ((0.5, {0}), (0.51, {0, 1}), (0.75, {0, 1}), (0.76, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        assert {draw(logits, params(top_p=top_p, seed=seed)) for seed in range(300)} == kept


def test_top_p_counts_the_share_of_what_min_p_and_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert {draw(logits, params(top_p=0.55, seed=seed)) for seed in range(300)} == {0, 1}
    assert {draw(logits, params(top_p=0.55, top_k=2, seed=seed)) for seed in range(300)} == {0}
    assert {draw(logits, params(top_p=0.55, min_p=0.7, seed=seed)) for seed in range(300)} == {0}


def test_a_very_high_temperature_is_nearly_flat() -> None:
    logits = random_logits(1, 16, seed=8)
    param = params(temperature=100.0, seed=1)
    tokens = sample(logits.expand(DRAWS, -1), [param] * DRAWS, list(range(DRAWS)))
    counts = torch.bincount(torch.tensor(tokens), minlength=16).tolist()
    check_counts(counts, distribution(logits[0].tolist(), param))


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-45, 5e-324])
def test_no_temperature_is_too_low(temperature: float, filters: dict[str, Any]) -> None:
    logits = random_logits(20, 300, seed=6) * 1e4
    rows = [params(temperature=temperature, **filters)] * 20
    assert sample(logits, rows, [1] * 20) == logits.argmax(dim=1).tolist()


def test_a_token_depends_on_seed_choice_and_position_and_on_nothing_else() -> None:
    logits = torch.zeros(1, 10_000)
    base = sample(logits, [params(seed=1)], [5])
    assert sample(logits.clone(), [params(seed=1, max_tokens=7)], [5]) == base
    assert sample(logits, [params(seed=2)], [5]) != base
    assert sample(logits, [params(seed=1 + 2**40)], [5]) != base
    assert sample(logits, [params(seed=1, choice_index=1)], [5]) != base
    assert sample(logits, [params(seed=1)], [6]) != base


def test_filters_do_not_change_the_noise() -> None:
    """Where a filter keeps the token that wins without it, it still wins."""
    logits = random_logits(40, 200, seed=9)
    free = sample(logits, [params(seed=i) for i in range(40)], [2] * 40)
    harmless: tuple[dict[str, Any], ...] = ({"top_k": 199}, {"min_p": 1e-30}, {"top_p": 0.9999999})
    for filters in harmless:
        assert sample(logits, [params(seed=i, **filters) for i in range(40)], [2] * 40) == free


@pytest.mark.parametrize("vocab_size", [300, 5000])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_a_row_gives_the_same_alone_and_in_any_batch(vocab_size: int, scale: float) -> None:
    logits = random_logits(60, vocab_size, seed=10, scale=scale)
    more: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"top_k": 1500}, {"top_p": 0.99}, {"top_k": 40})
    mixes = more + FILTERS
    rows = [params(seed=i, **mixes[i % len(mixes)]) for i in range(60)]
    positions = list(range(100, 160))
    together = sample(logits, rows, positions)
    alone = [sample(logits[i : i + 1], [rows[i]], [positions[i]])[0] for i in range(60)]
    reverse = sample(logits.flip(0), rows[::-1], positions[::-1])[::-1]
    assert together == alone == reverse


def test_the_logits_are_left_as_they_were() -> None:
    logits = random_logits(3, 50, seed=11)
    before = logits.clone()
    sample(logits, [params(temperature=0.0), params(min_p=0.3), params(top_k=3, top_p=0.5)], [1, 1, 1])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("filters", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_with_nan_or_infinity_has_an_error_and_the_others_their_tokens(
    bad: float, filters: dict[str, Any]
) -> None:
    logits = random_logits(3, 50, seed=12)
    healthy = sample(logits, [params(**filters)] * 3, [1] * 3)
    logits[1, 20] = bad
    tokens = sample(logits, [params(**filters)] * 3, [1] * 3)
    assert isinstance(tokens[1], SamplingError)
    assert "NaN or infinity" in str(tokens[1])
    assert [tokens[0], tokens[2]] == [healthy[0], healthy[2]]


def test_a_row_of_nothing_but_minus_infinity_has_an_error() -> None:
    assert isinstance(sample(torch.full((1, 9), -math.inf), [params()], [1])[0], SamplingError)


@pytest.mark.parametrize("filters", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.99}, {"min_p": 1e-9}])
def test_a_forbidden_token_is_never_drawn(filters: dict[str, Any]) -> None:
    logits = torch.full((200, 64), -math.inf)
    logits[:, [3, 50]] = torch.tensor([1.0, 2.0])
    tokens = sample(logits, [params(seed=i, **filters) for i in range(200)], [1] * 200)
    assert set(tokens) <= {3, 50}


def test_every_device_draws_the_same_tokens(device: str) -> None:
    """One near-tie in ten thousand rows may go the other way: logarithms differ in their last bits."""
    if device == "cpu":
        pytest.skip("the reference itself; run with --device cuda")
    logits = random_logits(400, 5000, seed=13)
    rows = [params(seed=i, **FILTERS[i % len(FILTERS)]) for i in range(400)]
    here, there = sample(logits, rows, [7] * 400), sample(logits.to(device), rows, [7] * 400)
    assert sum(a != b for a, b in zip(here, there, strict=True)) <= 1


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, 10), [], []) == []


@settings(max_examples=150)
@given(
    logits=st.lists(st.integers(-40, 40), min_size=1, max_size=60),
    temperature=st.sampled_from([1e-5, 0.1, 0.7, 1.0, 2.0, 100.0]),
    top_k=st.integers(0, 70),
    top_p=st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-4, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**31),
)
def test_a_token_is_always_one_that_the_filters_allow(
    logits: list[int], temperature: float, top_k: int, top_p: float, min_p: float, seed: int, position: int
) -> None:
    """At the filters' borders float32 may decide otherwise than Python, so borders are given a millionth's play."""
    values = [logit / 8 for logit in logits]
    param = params(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    assert draw(torch.tensor(values), param, position) in kept_tokens(values, param, play=1e-6 * temperature)
