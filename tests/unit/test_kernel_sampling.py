"""The C++ sampler draws the torch sampler's tokens, on every instruction set and with any number of threads."""

import functools
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.cpu_kernels import CPUKernels
from engine.kernels.instruction_sets import usable_instruction_sets
from engine.kernels.library import KernelLibrary
from engine.kernels.torch_kernels import TORCH_KERNELS
from engine.protocol.messages import SamplingParams
from engine.sampling.cpu_sampler import CPUSampler, choose_sampler
from engine.sampling.philox import noise_source, vocabulary_noise
from engine.sampling.sampler import SamplingError, sample

INSTRUCTION_SETS = [item.name for item in usable_instruction_sets()]
LARGEST_SEED = 2**64 - 1
TEMPERATURES = (0.0, 5e-324, 1e-5, 0.3, 1.0, 1.0, 2.0, 100.0)
TOP_KS = (0, 0, 0, 1, 3, 50, 499, 600, 1500, 4000)
TOP_PS = (1.0, 1.0, 0.0, 1e-9, 0.1, 0.5, 0.9, 0.95, 0.999)
MIN_PS = (0.0, 0.0, 0.0, 1e-9, 0.01, 0.3, 1.0)


def make_sampler(instruction_set: str, num_threads: int) -> CPUSampler:
    library = KernelLibrary(instruction_set)
    return CPUSampler(library, library.create_pool(num_threads, None, 0.0))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors on a busy machine are several times as fast on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[(name, threads) for name in INSTRUCTION_SETS for threads in (1, 2)], ids=str)
def sampler(request: pytest.FixtureRequest) -> CPUSampler:
    return make_sampler(*request.param)


def params(**overrides: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1, **overrides})


def draw_params(draw: random.Random) -> SamplingParams:
    return params(
        temperature=draw.choice(TEMPERATURES),
        top_k=draw.choice(TOP_KS),
        top_p=draw.choice(TOP_PS),
        min_p=draw.choice(MIN_PS),
        seed=draw.getrandbits(64),
        choice_index=draw.getrandbits(3),
    )


def draw_logits(draw: random.Random, num_rows: int, vocab_size: int) -> Tensor:
    """Return rows that are flat, wide, heavy-tailed, full of ties, or half excluded."""
    generator = torch.Generator().manual_seed(draw.getrandbits(30))
    logits = torch.randn(num_rows, vocab_size, generator=generator) * draw.choice((0.01, 0.3, 1.0, 3.0, 10.0))
    kind = draw.choice(("plain", "tied", "excluded", "heavy-tailed"))
    if kind == "tied":
        return (logits * 2).round() / 2
    if kind == "excluded":
        return logits.masked_fill(torch.rand(num_rows, vocab_size, generator=generator) < 0.5, -math.inf)
    return logits**3 if kind == "heavy-tailed" else logits


def comparable(tokens: list[int | SamplingError]) -> list[int | str]:
    return [token if isinstance(token, int) else str(token) for token in tokens]


def check_against_torch(
    sampler: CPUSampler, logits: Tensor, rows: list[SamplingParams], positions: list[int] | None = None
) -> None:
    where = list(range(1, len(rows) + 1)) if positions is None else positions
    assert comparable(sampler(logits, rows, where)) == comparable(sample(logits, rows, where))


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 499, 1000, 3001, 5000])
def test_tokens_are_those_of_torch_for_any_size_shape_of_logits_and_filters(
    vocab_size: int, sampler: CPUSampler
) -> None:
    draw = random.Random(vocab_size)
    for _ in range(8):
        num_rows = draw.choice((1, 2, 3, 5, 9))
        rows = [draw_params(draw) for _ in range(num_rows)]
        positions = [draw.getrandbits(32) for _ in range(num_rows)]
        check_against_torch(sampler, draw_logits(draw, num_rows, vocab_size), rows, positions)


@functools.cache  # no fixture, which pytest would make anew for each sampler
def large(spread: float) -> tuple[Tensor, list[SamplingParams], list[int | SamplingError]]:
    """Return logits over a large vocabulary, and what torch draws from them."""
    filters: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": 0.0},
        {"top_p": 0.9},
        {"top_p": 0.9999, "temperature": 0.3},
        {"top_k": 50, "top_p": 0.95},
        {"top_k": 2500},
        {"top_k": 20_000, "top_p": 0.5},
        {"min_p": 0.05, "temperature": 2.0},
    )
    logits = torch.randn(len(filters), 32_003, generator=torch.Generator().manual_seed(1)) * spread
    rows = [params(seed=i, **options) for i, options in enumerate(filters)]
    return logits, rows, sample(logits, rows, [1] * len(rows))


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])
def test_tokens_are_those_of_torch_over_a_large_vocabulary(spread: float, sampler: CPUSampler) -> None:
    logits, rows, expected = large(spread)
    assert sampler(logits, rows, [1] * len(rows)) == expected


@settings(max_examples=60)
@given(
    values=st.lists(
        st.one_of(
            st.integers(-80, 80).map(lambda eighths: eighths / 8),
            st.sampled_from([0.0, -0.0, -math.inf, 1e-45, -1e-45, 3e38, -3e38, 1e-30]),
        ),
        min_size=1,
        max_size=70,
    ),
    temperature=st.sampled_from(TEMPERATURES),
    top_k=st.integers(0, 80),
    top_p=st.sampled_from(TOP_PS),
    min_p=st.sampled_from(MIN_PS),
    seed=st.integers(0, LARGEST_SEED),
    position=st.integers(0, 2**32 - 1),
)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_tokens_are_those_of_torch_for_ties_extremes_and_any_filters(
    instruction_set: str,
    values: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    position: int,
) -> None:
    param = params(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    check_against_torch(make_sampler(instruction_set, 1), torch.tensor([values]), [param], [position])


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 0.5}, {"top_k": 2, "top_p": 0.5}, {}])
@pytest.mark.parametrize("place", [1, 30, 999])
def test_a_logit_too_near_the_largest_for_a_score_of_its_own_comes_first_by_its_id(
    place: int, filters: dict[str, Any], sampler: CPUSampler
) -> None:
    logits = torch.full((40, 1000), -math.inf)
    logits[:, 0], logits[:, place] = -1e-45, 0.0
    check_against_torch(sampler, logits, [params(temperature=2.0, seed=seed, **filters) for seed in range(40)])


@pytest.mark.parametrize("seed", [0, 7, 2**32, 1234567890123456789, LARGEST_SEED])
def test_flat_logits_give_the_token_with_the_largest_noise(seed: int, sampler: CPUSampler) -> None:
    num_rows, vocab_size = 40, 3000
    positions = [2**32 - 1 - 50 * row for row in range(num_rows)]
    rows = [params(seed=seed, choice_index=row) for row in range(num_rows)]
    source = noise_source([seed] * num_rows, list(range(num_rows)), positions, torch.device("cpu"))
    expected = vocabulary_noise(source, vocab_size).argmax(dim=1).tolist()
    assert sampler(torch.zeros(num_rows, vocab_size), rows, positions) == expected


@pytest.mark.parametrize("filters", [{}, {"top_k": 900}, {"top_p": 0.9}, {"top_p": 0.3, "top_k": 100}])
def test_equal_logits_are_kept_by_their_ids(filters: dict[str, Any], sampler: CPUSampler) -> None:
    check_against_torch(sampler, torch.zeros(20, 2000), [params(seed=seed, **filters) for seed in range(20)])


@pytest.mark.parametrize("filters", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}])
@pytest.mark.parametrize("place", [0, 20, 49])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_a_row_with_nan_or_infinity_has_an_error_and_the_others_their_tokens(
    bad: float, place: int, filters: dict[str, Any], sampler: CPUSampler
) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(12))
    healthy = sampler(logits, [params(**filters)] * 3, [1] * 3)
    logits[1, place] = bad
    tokens = sampler(logits, [params(**filters)] * 3, [1] * 3)
    assert "NaN or infinity" in str(tokens[1])
    assert [tokens[0], tokens[2]] == [healthy[0], healthy[2]]


def test_a_row_of_nothing_but_minus_infinity_has_an_error(sampler: CPUSampler) -> None:
    assert "every token is excluded" in str(sampler(torch.full((1, 9), -math.inf), [params()], [1])[0])


def test_the_lowest_id_of_equals_wins_wherever_it_stands(sampler: CPUSampler) -> None:
    logits = torch.zeros(4, 5000)
    for row, ids in enumerate(([4321, 17, 4999], [4999], [2047, 2048], [0, 4999])):
        logits[row, ids] = 2.5
    assert sampler(logits, [params(temperature=0.0)] * 4, [1] * 4) == [17, 4999, 2047, 0]


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_a_row_gives_the_same_alone_in_any_batch_and_with_any_number_of_threads(instruction_set: str) -> None:
    draw = random.Random(5)
    logits = torch.randn(12, 5000, generator=torch.Generator().manual_seed(5)) * 2
    rows = [draw_params(draw) for _ in range(12)]
    positions = list(range(100, 112))
    samplers = [make_sampler(instruction_set, num_threads) for num_threads in (1, 2, 3, 8)]
    for sampler in samplers:
        together = sampler(logits, rows, positions)
        alone = [sampler(logits[i : i + 1], [rows[i]], [positions[i]])[0] for i in range(12)]
        assert together == alone == samplers[0](logits, rows, positions)


def test_logits_may_be_rows_of_something_wider_and_are_left_as_they_were(sampler: CPUSampler) -> None:
    wide = torch.randn(5, 1003, generator=torch.Generator().manual_seed(6))
    wide[:, 1000:] = 50
    before = wide.clone()
    rows = [params(seed=seed, top_p=0.9) for seed in range(5)]
    assert sampler(wide[:, :1000], rows, [1] * 5) == sample(wide[:, :1000].contiguous(), rows, [1] * 5)
    assert torch.equal(wide, before)


def test_no_rows_give_no_tokens(sampler: CPUSampler) -> None:
    assert sampler(torch.empty(0, 10), [], []) == []


def test_a_rank_draws_with_what_it_computes_with() -> None:
    assert choose_sampler(TORCH_KERNELS) is sample
    library = KernelLibrary(INSTRUCTION_SETS[0])
    kernels = CPUKernels(library, library.create_pool(1, None, 0.0), torch.float32)
    assert isinstance(choose_sampler(kernels), CPUSampler)
