"""y = x W^T + b by the C++ kernels: as float64 has it, and the same bits of a row whatever is computed beside it."""

from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from engine.kernels.cpu_kernels import CPUKernels
from engine.kernels.instruction_sets import usable_instruction_sets
from engine.kernels.library import KernelLibrary

USABLE = [item.name for item in usable_instruction_sets()]
DTYPES = (torch.float32, torch.bfloat16)
SPIN_SECONDS = 1e-4
FLOAT32_EPSILON = 2.0**-24
# [tokens, outputs, inputs]: nothing, ones, tails of every kind of tile, more than a chunk, more than a block of tokens
SHAPES = (
    *[(0, 3, 4), (3, 0, 4), (3, 4, 0), (1, 1, 1), (2, 7, 31), (3, 13, 32), (4, 6, 33), (5, 100, 77), (9, 257, 129)],
    *[(8, 48, 512), (31, 50, 333), (133, 70, 4100), (300, 300, 100), (7, 2000, 64)],
)


@cache
def kernels(instruction_set: str, dtype: torch.dtype, num_threads: int) -> CPUKernels:
    library = KernelLibrary(instruction_set)
    return CPUKernels(library, library.create_pool(num_threads, None, SPIN_SECONDS), dtype)


each = pytest.mark.parametrize(
    ("instruction_set", "dtype"), [pytest.param(*pair, id=f"{pair[0]}-{pair[1]}") for pair in product(USABLE, DTYPES)]
)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, offset: int = 0) -> Tensor:
    """Return normal numbers that begin `offset` elements into a piece of memory whose other elements are NaN."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    memory = torch.full((numbers.numel() + offset + 64,), torch.nan, dtype=dtype)
    drawn = memory[offset : offset + numbers.numel()].view(shape)
    return drawn.copy_(numbers)


def assert_is_linear(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Assert that y is x W^T + b, but for what adding up in float32 and rounding to its type may change."""
    precise = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    largest = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    bound = (x.shape[1] + 4) * FLOAT32_EPSILON * largest
    if y.dtype == torch.bfloat16:
        bound = bound + precise.abs() * 2.0**-8
    assert y.shape == precise.shape
    assert ((y.double() - precise).abs() <= bound).all()


@each
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_what_float64_has_on_any_shape_with_and_without_a_bias(
    instruction_set: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    num_tokens, out_features, in_features = shape
    x = draw(num_tokens, in_features, dtype=dtype)
    weight = draw(out_features, in_features, dtype=dtype, seed=1)
    bias = draw(out_features, dtype=dtype, seed=2)
    computing = kernels(instruction_set, dtype, 2)
    assert_is_linear(computing.linear(x, weight), x, weight, None)
    assert_is_linear(computing.linear(x, weight, bias), x, weight, bias)


@each
def test_logits_are_float32_and_the_same_sums(instruction_set: str, dtype: torch.dtype) -> None:
    x, weight = draw(5, 300, dtype=dtype), draw(1000, 300, dtype=dtype, seed=1)
    computing = kernels(instruction_set, dtype, 2)
    logits = computing.logits(x, weight)
    assert logits.dtype == torch.float32
    assert_is_linear(logits, x, weight, None)
    assert torch.equal(logits.to(dtype), computing.linear(x, weight))


@each
@pytest.mark.parametrize("in_features", [77, 256, 2100])
def test_a_row_has_the_same_bits_alone_and_beside_any_number_of_others(
    instruction_set: str, dtype: torch.dtype, in_features: int
) -> None:
    x, weight = draw(200, in_features, dtype=dtype), draw(50, in_features, dtype=dtype, seed=1)
    computing = kernels(instruction_set, dtype, 2)
    alone = torch.cat([computing.logits(row[None], weight) for row in x])
    for num_tokens in (*range(1, 41), 64, 128, 200):
        assert torch.equal(computing.logits(x[:num_tokens], weight), alone[:num_tokens]), num_tokens
        assert torch.equal(computing.logits(x[-num_tokens:], weight), alone[-num_tokens:]), num_tokens


@each
def test_an_output_has_the_same_bits_beside_any_number_of_others(instruction_set: str, dtype: torch.dtype) -> None:
    x, weight = draw(5, 300, dtype=dtype), draw(400, 300, dtype=dtype, seed=1)
    computing = kernels(instruction_set, dtype, 2)
    y = computing.logits(x, weight)
    for first, stop in [(0, 1), (1, 8), (5, 18), (7, 399), (399, 400)]:
        assert torch.equal(computing.logits(x, weight[first:stop]), y[:, first:stop])


@each
def test_the_number_of_threads_changes_no_bit(instruction_set: str, dtype: torch.dtype) -> None:
    x, weight = draw(70, 1030, dtype=dtype), draw(500, 1030, dtype=dtype, seed=1)
    y = [kernels(instruction_set, dtype, num_threads).linear(x, weight) for num_threads in (1, 2, 3, 8)]
    assert all(torch.equal(y[0], other) for other in y)


@each
def test_memory_may_begin_at_any_element_and_what_lies_around_it_is_not_read(
    instruction_set: str, dtype: torch.dtype
) -> None:
    computing = kernels(instruction_set, dtype, 2)
    aligned = computing.linear(draw(9, 45, dtype=dtype), draw(20, 45, dtype=dtype), draw(20, dtype=dtype))
    for offset in (1, 3, 17):
        x, weight = draw(9, 45, dtype=dtype, offset=offset), draw(20, 45, dtype=dtype, offset=offset)
        bias = draw(20, dtype=dtype, offset=offset)
        assert torch.equal(computing.linear(x, weight, bias), aligned)


@each
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_reaches_the_outputs_it_belongs_to_and_no_others(
    instruction_set: str, dtype: torch.dtype, value: float
) -> None:
    x, weight = draw(9, 100, dtype=dtype), draw(20, 100, dtype=dtype, seed=1)
    x[3, 99], weight[17, 5] = value, value
    y, expected = kernels(instruction_set, dtype, 2).linear(x, weight), x.float() @ weight.float().T
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert torch.equal(y.isposinf(), expected.isposinf())
    assert y.isfinite().sum() == 8 * 19
