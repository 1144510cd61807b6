"""Copying in chunks: every number arrives, whatever the shapes, and what is told adds up to the whole."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoint import staging
from engine.checkpoint.staging import Stager, chunks

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "CHUNK_BYTES", 100)


@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (250,), (3, 5), (10, 10), (9, 40), (2, 3, 50), (0, 9), (25, 1)])
def test_everything_arrives_in_the_targets_type(
    shape: tuple[int, ...], dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    values = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    target, heard = torch.full(shape, -1, dtype=target_dtype), list[int]()
    Stager(CPU, heard.append).copy(target, values)
    assert torch.equal(target, values.to(target_dtype))
    assert sum(heard) == target.nbytes


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 29), st.integers(0, 29))
def test_slices_of_larger_tensors_are_copied_to_slices_of_others(rows: int, columns: int, top: int, left: int) -> None:
    """As row-parallel shards are: neither side is contiguous."""
    source = torch.arange(60 * 60.0).view(60, 60)
    target = torch.zeros(60, 60)
    Stager(CPU).copy(target[top : top + rows, left : left + columns], source[left : left + rows, top : top + columns])
    expected = torch.zeros(60, 60)
    expected[top : top + rows, left : left + columns] = source[left : left + rows, top : top + columns]
    assert torch.equal(target, expected)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.sampled_from(DTYPES))
def test_a_chunk_is_no_larger_than_a_buffer_where_a_row_is_not(shape: list[int], dtype: torch.dtype) -> None:
    values = torch.zeros(shape, dtype=dtype)
    row = values[0].nbytes if values.ndim else values.nbytes
    parts = list(chunks(torch.zeros(shape), values))
    assert all(rows.nbytes <= max(100, row) for _, rows in parts)
    assert all(target.shape == rows.shape for target, rows in parts)
    assert sum(rows.numel() for _, rows in parts) == values.numel()


def test_what_advance_raises_ends_the_copying() -> None:
    def refuse(_: int) -> None:
        raise InterruptedError

    target = torch.zeros(1000)
    with pytest.raises(InterruptedError):
        Stager(CPU, refuse).copy(target, torch.ones(1000))
    assert target.sum() == 25


def test_zeros_are_told_of_too() -> None:
    target, heard = torch.ones(3, 4), list[int]()
    stager = Stager(CPU, heard.append)
    stager.clear(target[:, 2:])
    stager.clear(target[:0])
    assert target.sum() == 6
    assert heard == [24]


def test_a_tensor_without_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="the model lies on the device meta"):
        Stager(CPU).copy(torch.zeros(3, device="meta"), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pinned_buffers_bring_the_same_numbers_to_a_cuda_device(device: str, dtype: torch.dtype) -> None:
    if device != "cuda":
        pytest.skip("needs --device cuda")
    source = torch.randn(300, 70)
    target = torch.zeros(300, 90, dtype=dtype, device=device)
    stager = Stager(torch.device(device))
    for _ in range(20):  # each buffer many times
        stager.copy(target[:, 5:60], source[:, 10:65])
    stager.finish()
    expected = torch.zeros(300, 90, dtype=dtype)
    expected[:, 5:60] = source[:, 10:65]
    assert torch.equal(target.cpu(), expected)
