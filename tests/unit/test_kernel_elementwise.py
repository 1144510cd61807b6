"""Norm and activation by the C++ kernels: as float64 has them, and the same bits of a row in any batch."""

from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from engine.kernels.cpu_kernels import CPUKernels
from engine.kernels.instruction_sets import usable_instruction_sets
from engine.kernels.library import KernelLibrary
from engine.kernels.torch_kernels import TORCH_KERNELS

USABLE = [item.name for item in usable_instruction_sets()]
DTYPES = (torch.float32, torch.bfloat16)
SPIN_SECONDS = 1e-4
SHAPES = ((0, 5), (1, 1), (3, 15), (2, 16), (5, 17), (1, 20_000), (70, 1000), (9, 4096))  # [tokens, size]
# bfloat16 is rounded twice, by half an ulp each; one of the first may be two of the second.
ULPS = {torch.float32: 6, torch.bfloat16: 1.51}


@cache
def kernels(instruction_set: str, dtype: torch.dtype, num_threads: int = 2) -> CPUKernels:
    library = KernelLibrary(instruction_set)
    return CPUKernels(library, library.create_pool(num_threads, None, SPIN_SECONDS), dtype)


each = pytest.mark.parametrize(
    ("instruction_set", "dtype"), [pytest.param(*pair, id=f"{pair[0]}-{pair[1]}") for pair in product(USABLE, DTYPES)]
)
each_instruction_set = pytest.mark.parametrize("instruction_set", USABLE)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_within_ulps(found: Tensor, precise: Tensor, ulps: float) -> None:
    """Assert that what was found is off by at most so many units in the last place of what is right."""
    tiny = torch.finfo(found.dtype).smallest_normal
    _, exponent = precise.abs().clamp_min(tiny).frexp()
    ulp = torch.finfo(found.dtype).eps * torch.exp2((exponent - 1).double())
    error = ((found.double() - precise).abs() / ulp).max() if found.numel() else 0
    assert error <= ulps


@each
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_mul_is_what_float64_has(instruction_set: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    num_tokens, size = shape
    gate_up = draw(num_tokens, 2 * size, dtype=dtype)
    gate, up = gate_up.double().chunk(2, 1)
    found = kernels(instruction_set, dtype).silu_mul(gate_up)
    assert found.dtype == dtype
    assert_within_ulps(found, gate / (1 + torch.exp(-gate)) * up, ULPS[dtype])


@each
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_residual", [False, True])
def test_add_rms_norm_is_what_float64_has(
    instruction_set: str, dtype: torch.dtype, shape: tuple[int, int], has_residual: bool
) -> None:
    x, weight = draw(*shape, dtype=dtype), draw(shape[1], dtype=dtype, seed=1)
    residual = draw(*shape, dtype=dtype, seed=2) if has_residual else None
    y, total = kernels(instruction_set, dtype).add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x if residual is None else x + residual)
    precise = total.double()
    scale = torch.rsqrt(precise.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert_within_ulps(y, precise * scale * weight.double(), ULPS[dtype])


@each
def test_a_row_has_the_same_bits_in_any_batch_and_number_of_threads(instruction_set: str, dtype: torch.dtype) -> None:
    for size in (33, 3000):
        x, residual, weight = (draw(*shape, dtype=dtype) for shape in ((40, size), (40, size), (size,)))
        gate_up = torch.cat((x, residual), 1)
        one = kernels(instruction_set, dtype, 1)
        normed = torch.cat([one.add_rms_norm(x[i : i + 1], residual[i : i + 1], weight, 1e-6)[0] for i in range(40)])
        activated = torch.cat([one.silu_mul(gate_up[i : i + 1]) for i in range(40)])
        for num_threads, num_tokens in product((1, 3), (2, 7, 40)):
            several = kernels(instruction_set, dtype, num_threads)
            found = several.add_rms_norm(x[:num_tokens], residual[:num_tokens], weight, 1e-6)[0]
            assert torch.equal(found, normed[:num_tokens])
            assert torch.equal(several.silu_mul(gate_up[:num_tokens]), activated[:num_tokens])


@each
def test_rounding_to_the_type_is_where_torch_has_it(instruction_set: str, dtype: torch.dtype) -> None:
    x, residual, weight = (draw(*shape, dtype=dtype) for shape in ((50, 512), (50, 512), (512,)))
    computes = kernels(instruction_set, dtype)
    pairs = [
        (computes.silu_mul(x), TORCH_KERNELS.silu_mul(x)),
        (computes.add_rms_norm(x, residual, weight, 1e-5)[0], TORCH_KERNELS.add_rms_norm(x, residual, weight, 1e-5)[0]),
    ]
    for ours, theirs in pairs:
        if dtype == torch.bfloat16:  # but where float32 was a last bit off, just beside the middle of two numbers
            assert (ours != theirs).float().mean() < 1e-3
        assert_within_ulps(ours, theirs.double(), ULPS[torch.float32])


@each_instruction_set
def test_exp_is_within_two_ulps_over_all_exponents(instruction_set: str) -> None:
    # silu(g) * u with u = 1 / g leaves the sigmoid, 1 / (1 + exp(-g)): exp's own error shows where exp(-g) is large.
    gate = torch.cat([torch.linspace(-87, -8, 400_000), -torch.logspace(-3, 0.9, 100_000)])
    found = kernels(instruction_set, torch.float32).silu_mul(torch.cat((gate, torch.ones_like(gate)))[None])[0]
    precise = gate.double() / (1 + torch.exp(-gate.double()))
    assert_within_ulps(found, precise, 3.5)  # of exp, the addition and the division


@each
def test_what_is_not_finite_or_very_large_ends_as_with_torch(instruction_set: str, dtype: torch.dtype) -> None:
    inf, largest = torch.inf, torch.finfo(dtype).max
    gate = torch.tensor([inf, -inf, torch.nan, largest, -largest, 1e30, -1e30, 200.0, -200.0, 88.8, -88.8, 0.0, -0.0])
    up = torch.ones_like(gate)
    gate_up = torch.cat((gate, up)).to(dtype)[None]
    ours, theirs = (x.silu_mul(gate_up)[0] for x in (kernels(instruction_set, dtype), TORCH_KERNELS))
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-6, atol=1e-36)
    assert torch.equal(ours[-2:].signbit(), torch.tensor([False, True]))


@each
def test_a_row_that_is_not_finite_leaves_the_others_alone(instruction_set: str, dtype: torch.dtype) -> None:
    x, weight = draw(9, 100, dtype=dtype), draw(100, dtype=dtype, seed=1)
    computes = kernels(instruction_set, dtype)
    clean, activated = computes.add_rms_norm(x, None, weight, 1e-5)[0], computes.silu_mul(x)
    x[4, 7] = torch.nan
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(computes.add_rms_norm(x, None, weight, 1e-5)[0][others], clean[others])
    assert torch.equal(computes.silu_mul(x)[others], activated[others])
    assert computes.add_rms_norm(x, None, weight, 1e-5)[0][4].isnan().all()


@each
def test_rows_of_zeros_stay_zeros(instruction_set: str, dtype: torch.dtype) -> None:
    x = torch.zeros(3, 40, dtype=dtype)
    computes = kernels(instruction_set, dtype)
    assert not computes.add_rms_norm(x, x, torch.ones(40, dtype=dtype), 1e-5)[0].any()
    assert not computes.silu_mul(x).any()
