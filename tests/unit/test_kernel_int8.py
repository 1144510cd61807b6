"""Products with int8 matrices: what exact arithmetic has, the same bits at any number of tokens, and their rounding."""

from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from engine.kernels.cpu_kernels import CPUKernels
from engine.kernels.instruction_sets import usable_instruction_sets
from engine.kernels.int8_kernels import MOST_PRECISE_TOKENS
from engine.kernels.library import KernelLibrary
from engine.kernels.torch_kernels import TORCH_KERNELS

USABLE = [item.name for item in usable_instruction_sets()]
WITH_VNNI = [name for name in USABLE if name == "avx512_bf16"]
DTYPES = (torch.float32, torch.bfloat16)
SPIN_SECONDS = 1e-4
FLOAT32_EPSILON = 2.0**-24
# [tokens, outputs, inputs]: nothing, ones, tails of every kind of tile and step, more than a chunk, a block of tokens
SHAPES = (
    *[(0, 3, 4), (3, 0, 4), (1, 1, 1), (2, 7, 31), (3, 13, 64), (4, 6, 65), (5, 100, 77), (9, 257, 129)],
    *[(6, 48, 512), (31, 50, 333), (133, 70, 4100), (200, 30, 100), (7, 2000, 64)],
)


@cache
def kernels(instruction_set: str, dtype: torch.dtype, *, is_batch_invariant: bool) -> CPUKernels:
    library = KernelLibrary(instruction_set)
    pool = library.create_pool(2, None, SPIN_SECONDS)
    return CPUKernels(library, pool, dtype, is_batch_invariant=is_batch_invariant)


each = pytest.mark.parametrize(
    ("instruction_set", "dtype"), [pytest.param(*pair, id=f"{pair[0]}-{pair[1]}") for pair in product(USABLE, DTYPES)]
)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw_matrix(out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Return int8 rows, the extremes among them, and scales; the rows' memory ends where they end."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(-127, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
    return rows, torch.rand(out_features, generator=generator) + 0.5


def rounded(x: Tensor, most: int) -> Tensor:
    """Return activations in float64 as integers up to `most` times a scale for each token would have them."""
    scale = x.double().abs().amax(1, keepdim=True).clamp(min=1e-30) / most
    return (x.double() / scale).round() * scale


def error_bound(x: Tensor, weight: Tensor, steps: int) -> Tensor:
    """Return how far a product may be off whose activations are rounded to one of `steps` up to the largest of them."""
    half_a_step = x.double().abs().amax(1, keepdim=True) / steps * 0.51
    return half_a_step * weight.abs().sum(1) + x.shape[1] * FLOAT32_EPSILON * (x.double().abs() @ weight.abs().T)


def assert_is_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, bound: Tensor) -> None:
    precise = x.double() @ weight.T + (0 if bias is None else bias.double())
    if bias is not None:
        bound = bound + 4 * FLOAT32_EPSILON * (precise.abs() + bias.double().abs())
    if y.dtype == torch.bfloat16:
        bound = bound + precise.abs() * 2.0**-8
    assert y.shape == precise.shape
    assert ((y.double() - precise).abs() <= bound).all()


@each
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_invariant_products_are_those_of_activations_of_16_bits(
    instruction_set: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    num_tokens, out_features, in_features = shape
    x = draw(num_tokens, in_features, dtype=dtype)
    rows, scale = draw_matrix(out_features, in_features)
    bias = draw(out_features, dtype=dtype, seed=2)
    weight = rows.double() * scale.double().unsqueeze(1)
    computing = kernels(instruction_set, dtype, is_batch_invariant=True)
    bound = error_bound(x, weight, 32639)
    assert_is_product(computing.linear(x, rows, None, scale), x, weight, None, bound)
    assert_is_product(computing.linear(x, rows, bias, scale), x, weight, bias, bound)
    assert_is_product(computing.logits(x, rows, scale), x, weight, None, bound)


@each
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_for_many_tokens_are_those_of_activations_of_8_bits_or_better(
    instruction_set: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    num_tokens, out_features, in_features = shape
    x = draw(num_tokens, in_features, dtype=dtype)
    rows, scale = draw_matrix(out_features, in_features)
    weight = rows.double() * scale.double().unsqueeze(1)
    y = kernels(instruction_set, dtype, is_batch_invariant=False).logits(x, rows, scale)
    assert y.dtype == torch.float32
    assert_is_product(y, x, weight, None, error_bound(x, weight, 127))


@pytest.mark.parametrize("instruction_set", WITH_VNNI)
@pytest.mark.parametrize(("num_tokens", "most"), [(MOST_PRECISE_TOKENS, 32639), (MOST_PRECISE_TOKENS + 1, 127)])
@pytest.mark.parametrize("in_features", [64, 2048, 20000])
def test_sums_of_integers_are_exact(instruction_set: str, num_tokens: int, most: int, in_features: int) -> None:
    x = torch.full((num_tokens, in_features), 3.0)
    x[0, ::2] = -3.0
    rows = torch.full((5, in_features), 127, dtype=torch.int8)
    rows[1] = -127
    rows[2, 1::2] = -127
    rows[3] = 1
    y = kernels(instruction_set, torch.float32, is_batch_invariant=False).logits(x, rows, torch.ones(5))
    exact = rounded(x, most) @ rows.double().T
    assert ((y.double() - exact).abs() <= exact.abs() * 8 * FLOAT32_EPSILON).all()


@each
def test_a_row_has_the_same_bits_whatever_is_computed_beside_it_if_batch_invariant(
    instruction_set: str, dtype: torch.dtype
) -> None:
    rows, scale = draw_matrix(203, 700)
    x = draw(150, 700, dtype=dtype)
    x[40] *= 1e4
    computing = kernels(instruction_set, dtype, is_batch_invariant=True)
    alone = torch.cat([computing.linear(token.unsqueeze(0), rows, None, scale) for token in x])
    for num_tokens in (2, 3, 4, 5, 6, 7, 13, 32, 97, 150):
        assert torch.equal(computing.linear(x[:num_tokens], rows, None, scale), alone[:num_tokens])
    assert torch.equal(computing.linear(x[37:], rows, None, scale), alone[37:])


@each
def test_a_token_of_zeros_has_zeros_and_so_has_a_row_without_a_scale(instruction_set: str, dtype: torch.dtype) -> None:
    rows, scale = draw_matrix(9, 100)
    rows[3], scale[3] = 0, 0
    x = draw(7, 100, dtype=dtype)
    x[2] = 0
    for is_batch_invariant in (False, True):
        y = kernels(instruction_set, dtype, is_batch_invariant=is_batch_invariant).logits(x, rows, scale)
        assert (y[2] == 0).all()
        assert (y[:, 3] == 0).all()
        assert y.isfinite().all()


@each
@pytest.mark.parametrize("in_features", [64, 100])
@pytest.mark.parametrize("place", [0, 17, -1])
def test_what_is_no_number_is_none_afterwards(
    instruction_set: str, dtype: torch.dtype, in_features: int, place: int
) -> None:
    rows, scale = draw_matrix(9, in_features)
    x = draw(7, in_features, dtype=dtype)
    weight = draw(9, in_features, dtype=dtype)
    x[2, place] = weight[3, place] = torch.nan
    for is_batch_invariant in (False, True):
        computing = kernels(instruction_set, dtype, is_batch_invariant=is_batch_invariant)
        assert computing.logits(x, rows, scale).isnan().all(1).tolist() == [token == 2 for token in range(7)]
        assert computing.int8_scales(weight).isnan().tolist() == [row == 3 for row in range(9)]


def test_sums_beyond_float16_are_products_of_float16_none_the_less() -> None:
    x, rows = torch.full((2, 4096), 3.0, dtype=torch.float16), torch.full((5, 4096), 127, dtype=torch.int8)
    scale = torch.full((5,), 2.0**-10)
    expected = torch.full((2, 5), 3 * 4096 * 127 * 2.0**-10)
    assert torch.equal(TORCH_KERNELS.linear(x, rows, None, scale), expected.half())
    assert torch.equal(TORCH_KERNELS.logits(x, rows, scale), expected)


def matrices(dtype: torch.dtype) -> Tensor:
    """Return rows of zeros, of one large number, of ties, of tiny numbers, and random ones of several sizes."""
    weight = draw(40, 75, dtype=torch.float32) * torch.logspace(-30, 30, 40).unsqueeze(1)
    weight[0] = 0
    weight[1] = 1e-42  # its scale is 0, or all but 0
    weight[2], weight[2, 7] = 0, -5
    weight[3] = torch.arange(75) - 37 + 0.5
    weight[3, 0] = 127
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_rounding_to_int8_is_to_the_nearest_with_the_largest_at_127(dtype: torch.dtype) -> None:
    weight = matrices(torch.float32).clamp(-6e4, 6e4).to(dtype)
    scales = TORCH_KERNELS.int8_scales(weight)
    rows = TORCH_KERNELS.int8_rows(weight, scales)
    largest = rows.abs().amax(1)
    assert scales.dtype == torch.float32
    assert (rows[0] == 0).all()
    assert (largest[weight.abs().amax(1) > 1e-30] == 127).all()
    difference = rows.double() * scales.double().unsqueeze(1) - weight.double()
    assert (difference.abs() <= scales.double().unsqueeze(1) * 0.5001 + 1e-37).all()
    assert rows[3, 1:].tolist() == [round(value) for value in weight[3, 1:].float().tolist()]  # ties to even


@each
def test_every_instruction_set_rounds_to_the_same_bits_as_torch(instruction_set: str, dtype: torch.dtype) -> None:
    weight = matrices(dtype)
    computing = kernels(instruction_set, dtype, is_batch_invariant=False)
    scales = TORCH_KERNELS.int8_scales(weight)
    assert torch.equal(computing.int8_scales(weight), scales)
    assert torch.equal(computing.int8_rows(weight, scales), TORCH_KERNELS.int8_rows(weight, scales))
    columns = slice(11, 60)  # of a larger matrix
    expected = TORCH_KERNELS.int8_rows(weight[:, columns], scales)
    assert torch.equal(computing.int8_rows(weight[:, columns], scales), expected)


def test_float16_is_rounded_by_torch() -> None:
    weight = draw(5, 33, dtype=torch.float16)
    computing = kernels(USABLE[0], torch.float32, is_batch_invariant=False)
    scales = computing.int8_scales(weight)
    assert torch.equal(scales, TORCH_KERNELS.int8_scales(weight))
    assert torch.equal(computing.int8_rows(weight, scales), TORCH_KERNELS.int8_rows(weight, scales))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_torch_multiplies_by_int8_matrices_too(dtype: torch.dtype) -> None:
    x = draw(6, 128, dtype=dtype)
    rows, scale = draw_matrix(20, 128)
    bias = draw(20, dtype=dtype, seed=2)
    precise = x.double() @ (rows.double() * scale.double().unsqueeze(1)).T
    y = TORCH_KERNELS.linear(x, rows, bias, scale)
    assert y.dtype == dtype
    assert torch.allclose(y.double(), precise + bias.double(), rtol=0, atol=2e-2 * float(precise.abs().max()))
    assert TORCH_KERNELS.logits(x, rows, scale).dtype == torch.float32
