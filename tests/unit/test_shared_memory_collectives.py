"""Collectives in shared memory: the same arithmetic on every instruction set, and what is noticed when ranks go wrong.

The ranks are threads here, each with a mapping and an end of its own. tests/integration has them as processes.
"""

import mmap
import os
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.communication import segment, shared_memory
from engine.communication.shared_memory import SUMMED_TYPES, SharedMemoryCollectives, segment_bytes
from engine.kernels.instruction_sets import usable_instruction_sets
from engine.kernels.library import KernelLibrary
from engine.protocol.stats import OPERATIONS

T = TypeVar("T")
INSTRUCTION_SETS = [item.name for item in usable_instruction_sets()]
SLOT = shared_memory.SLOT_BYTES


@contextmanager
def ends_of(
    world_size: int,
    *,
    instruction_set: str = INSTRUCTION_SETS[0],
    timeout_seconds: float = 30.0,
    is_timed: bool = True,
) -> Iterator[list[SharedMemoryCollectives]]:
    """Yield the ends of a group, by rank."""
    library = KernelLibrary(instruction_set)
    size = segment_bytes(library, world_size)
    descriptor = segment.create(size)
    ends = [
        SharedMemoryCollectives(
            library,
            segment.map_segment(descriptor, size),
            rank=rank,
            pidfds=[-1] * world_size,
            store=None,
            timeout_seconds=timeout_seconds,
            spin_seconds=1e-5,
            is_timed=is_timed,
        )
        for rank in range(world_size)
    ]
    os.close(descriptor)
    try:
        yield ends
    finally:
        for end in ends:
            end.close()


def on_all(ends: list[SharedMemoryCollectives], work: Callable[[SharedMemoryCollectives], T]) -> list[T]:
    """Do a piece of work on all ranks at once."""
    with ThreadPoolExecutor(len(ends)) as pool:
        return list(pool.map(work, ends))


def errors_of(ends: list[SharedMemoryCollectives], work: Callable[[SharedMemoryCollectives], object]) -> list[str]:
    """Return how each rank's work fails."""

    def fail(end: SharedMemoryCollectives) -> str:
        with pytest.raises(RuntimeError) as failure:
            work(end)
        return str(failure.value)

    return on_all(ends, fail)


def random_tensor(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(-(2**62), 2**62, shape, generator=generator, dtype=dtype)


def sum_in_rank_order(tensors: list[Tensor]) -> Tensor:
    """The definition: in float32 at least, rank 0's first, rounded once."""
    dtype = tensors[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = tensors[0].to(wide)
    for tensor in tensors[1:]:
        total = total + tensor.to(wide)
    return total.to(dtype)


def check_near_float64(total: Tensor, tensors: list[Tensor]) -> None:
    if total.dtype.is_floating_point and total.numel():
        exact = torch.stack([tensor.double() for tensor in tensors]).sum(0)
        size = torch.stack([tensor.double().abs() for tensor in tensors]).sum(0)
        assert ((total.double() - exact).abs() <= 2 * torch.finfo(total.dtype).eps * size + 1e-7 * size).all()


SHAPES = [(0,), (1,), (7,), (3, 5), (129, 65), (1, 2048), (SLOT // 4 + 9,), (5, SLOT // 3)]


@pytest.mark.parametrize("dtype", list(SUMMED_TYPES), ids=str)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_an_all_reduce_is_the_sum_in_rank_order_on_every_rank(
    world_size: int, instruction_set: str, dtype: torch.dtype
) -> None:
    with ends_of(world_size, instruction_set=instruction_set) as ends:
        for shape in SHAPES:
            tensors = [random_tensor(rank, shape, dtype) for rank in range(world_size)]
            results = [tensor.clone() for tensor in tensors]
            on_all(ends, lambda end, results=results: end.all_reduce(results[end.rank]))  # type: ignore[misc]
            expected = sum_in_rank_order(tensors)
            assert all(torch.equal(result, expected) for result in results), shape
            check_near_float64(expected, tensors)


@settings(max_examples=40)
@given(
    world_size=st.integers(2, 5),
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    dtype=st.sampled_from([*SUMMED_TYPES, torch.uint8, torch.bool]),
    data=st.data(),
)
def test_gathers_and_scatters_along_any_dimension_are_torchs(
    world_size: int, shape: list[int], dtype: torch.dtype, data: st.DataObject
) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    tensors = [random_tensor(rank, tuple(shape), torch.float32).to(dtype) for rank in range(world_size)]
    long_shape = list(shape)
    long_shape[dim] *= world_size
    with ends_of(world_size) as ends:
        everything = torch.cat(tensors, dim)
        assert all(
            torch.equal(each, everything) for each in on_all(ends, lambda end: end.all_gather(tensors[end.rank], dim))
        )
        first, *others = on_all(ends, lambda end: end.gather(tensors[end.rank], dim))
        assert first is not None
        assert torch.equal(first, everything)
        assert others == [None] * (world_size - 1)
        if dtype in SUMMED_TYPES:
            long = [random_tensor(rank, tuple(long_shape), dtype) for rank in range(world_size)]
            parts = on_all(ends, lambda end: end.reduce_scatter(long[end.rank], dim))
            assert torch.equal(torch.cat(parts, dim), sum_in_rank_order(long))


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_does_not_fit_into_a_slot_goes_in_several_rounds(world_size: int) -> None:
    rows, columns = 3, SLOT // 8 + 13
    tensors = [random_tensor(rank, (rows, world_size * columns), torch.float32) for rank in range(world_size)]
    with ends_of(world_size) as ends:
        for dim in (0, 1):
            everything = torch.cat(tensors, dim)
            for each in on_all(ends, lambda end, dim=dim: end.all_gather(tensors[end.rank], dim)):  # type: ignore[misc]
                assert torch.equal(each, everything)
            gathered = on_all(ends, lambda end, dim=dim: end.gather(tensors[end.rank], dim))[0]  # type: ignore[misc]
            assert gathered is not None
            assert torch.equal(gathered, everything)
        parts = on_all(ends, lambda end: end.reduce_scatter(tensors[end.rank], 1))
        assert torch.equal(torch.cat(parts, 1), sum_in_rank_order(tensors))
        copies = [tensor.clone() for tensor in tensors]
        on_all(ends, lambda end: end.broadcast(copies[end.rank], world_size - 1))
        assert all(torch.equal(copy, tensors[-1]) for copy in copies)


def test_sixty_four_ranks_add_up() -> None:
    tensors = [random_tensor(rank, (1001,), torch.bfloat16) for rank in range(64)]
    results = [tensor.clone() for tensor in tensors]
    with ends_of(64) as ends:
        on_all(ends, lambda end: end.all_reduce(results[end.rank]))
    assert all(torch.equal(result, sum_in_rank_order(tensors)) for result in results)


def test_a_sum_of_what_cannot_be_summed_is_refused() -> None:
    with ends_of(2) as ends, pytest.raises(ValueError, match=r"cannot sum torch\.int32"):
        ends[0].all_reduce(torch.ones(3, dtype=torch.int32))


# --- times -----------------------------------------------------------------------------------------------------------


def test_each_operation_is_counted_once_with_its_waiting() -> None:
    def work(end: SharedMemoryCollectives) -> None:
        end.all_reduce(torch.ones(3))
        end.all_gather(torch.ones(3), 0)
        end.gather(torch.ones(3), 0)
        end.broadcast(torch.ones(3), 0)
        end.reduce_scatter(torch.ones(2), 0)
        end.barrier()
        end.barrier()

    with ends_of(2) as ends:
        on_all(ends, work)
        whole, waiting, num_bytes = ends[0].take_times()
        assert {name: sum(delta.counts) for name, delta in whole.items()} == {
            name: 1 + (name == "barrier") for name in OPERATIONS
        }
        assert whole.keys() == waiting.keys()
        assert all(0 <= waiting[name].sum < delta.sum for name, delta in whole.items())
        assert num_bytes == {
            "all_reduce": 12,  # as nccl-tests counts them: of one rank …
            "broadcast": 12,
            "all_gather": 24,  # … and of all together
            "gather": 24,
            "reduce_scatter": 8,
            "barrier": 0,
        }
        assert ends[0].take_times() == ({}, {}, {})


def test_a_run_is_computing_but_for_its_collectives() -> None:
    def work(end: SharedMemoryCollectives) -> "tuple[array[float], float]":
        end.barrier()  # of no run
        runs = end.run_timer()
        runs.begin()
        if end.rank == 1:
            time.sleep(2)
        end.all_reduce(torch.ones(1))
        runs.end()
        return runs.take_runs(), end.take_times().whole["all_reduce"].sum

    with ends_of(2) as ends:
        (quick, quick_communicating), (late, late_communicating) = on_all(ends, work)
    assert (quick[1], late[1]) == pytest.approx((quick_communicating, late_communicating))
    assert quick[0] < 1 < quick[1]
    assert late[1] < 1 < late[0]


def test_where_operations_are_not_timed_they_are_done_all_the_same() -> None:
    def work(end: SharedMemoryCollectives) -> float:
        total = torch.ones(1)
        end.all_reduce(total)
        end.barrier()
        return total.item()

    with ends_of(2, is_timed=False) as ends:
        assert on_all(ends, work) == [2, 2]
        assert [end.take_times() for end in ends] == [({}, {}, {})] * 2


def test_the_time_for_a_slower_rank_is_waiting() -> None:
    slow = torch.ones(1)

    def work(end: SharedMemoryCollectives) -> None:
        if end.rank == 1:
            time.sleep(2)
        end.all_reduce(slow.clone())

    with ends_of(2) as ends:
        on_all(ends, work)
        quick, late = (end.take_times() for end in ends)
    assert 1 < quick.waiting["all_reduce"].sum <= quick.whole["all_reduce"].sum
    assert late.waiting["all_reduce"].sum < 1


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (
            lambda end: end.all_reduce(torch.ones(4)),
            lambda end: end.all_reduce(torch.ones(5)),
            ("all_reduce (16 bytes of float32)", "all_reduce (20 bytes of float32)"),
        ),
        (
            lambda end: end.all_reduce(torch.ones(4)),
            lambda end: end.all_reduce(torch.ones(8, dtype=torch.bfloat16)),
            ("all_reduce (16 bytes of float32)", "all_reduce (16 bytes of bfloat16)"),
        ),
        (
            lambda end: end.barrier(),
            lambda end: end.all_gather(torch.ones(4), 0),
            ("barrier", "all_gather (16 bytes)"),
        ),
        (
            lambda end: [end.broadcast(torch.ones(4), 0), end.barrier()],
            lambda end: [end.broadcast(torch.ones(4), 1), end.barrier()],
            ("broadcast from rank 0 (16 bytes)", "broadcast from rank 1 (16 bytes)"),
        ),
        (
            lambda end: [end.gather(torch.ones(4), 0), end.barrier()],
            lambda end: [end.gather(torch.ones(2), 0), end.barrier()],
            ("gather (16 bytes)", "gather (8 bytes)"),
        ),
    ],
    ids=["sizes", "types", "operations", "sources", "sizes of a gather"],
)
def test_ranks_that_do_not_do_the_same_all_learn_of_it(
    first: Callable[[SharedMemoryCollectives], object],
    second: Callable[[SharedMemoryCollectives], object],
    words: tuple[str, str],
) -> None:
    with ends_of(2) as ends:
        errors = errors_of(ends, lambda end: (first, second)[end.rank](end))
    for error in errors:
        assert error.startswith("ranks do not do the same: ")
        assert all(
            f"rank {rank} calls {word}" in error or f"rank {rank} {word}" in error for rank, word in enumerate(words)
        )


def test_a_rank_that_does_not_come_is_named_with_what_it_is_missing_in() -> None:
    with ends_of(4, timeout_seconds=2) as ends:
        present = [end for end in ends if end.rank != 2]
        for error in errors_of(present, lambda end: end.all_reduce(torch.ones(8))):
            begin, seconds = error.split(" within ")
            assert begin == "rank 2 has not come to all_reduce (32 bytes of float32)"
            assert float(seconds.split(" ")[0]) >= 2
        assert "rank 2 has not come" in errors_of([ends[0]], lambda end: end.barrier())[0]


def test_a_rank_that_was_killed_while_it_wrote_why_it_fails_does_not_hold_up_the_others() -> None:
    library = KernelLibrary(INSTRUCTION_SETS[0])
    descriptor = segment.create(segment_bytes(library, 2))
    memory = segment.map_segment(descriptor, segment_bytes(library, 2))
    os.close(descriptor)
    memory[0] = 1  # the segment begins with the state of the failure: being written
    end = SharedMemoryCollectives(
        library, memory, rank=0, pidfds=[-1, -1], store=None, timeout_seconds=0.1, spin_seconds=0.0
    )
    assert "rank 1 has not come to barrier" in errors_of([end], lambda end: end.barrier())[0]
    end.close()


def test_whoever_waits_for_a_waiting_rank_names_the_one_that_is_missing() -> None:
    """Rank 1 gives nothing to rank 0 before rank 2 has come: rank 2 it is that is missing."""

    def work(end: SharedMemoryCollectives) -> None:
        for _ in range(3):
            end.broadcast(torch.ones(8), 1)

    with ends_of(3, timeout_seconds=2) as ends:
        for error in errors_of(ends[:2], work):
            assert error.startswith("rank 2 has not come to broadcast from rank 1")


def test_a_rank_that_has_left_is_named_at_once() -> None:
    with ends_of(3, timeout_seconds=60) as ends:
        on_all(ends, lambda end: end.barrier())
        ends[1].close()
        for error in errors_of([ends[0], ends[2]], lambda end: end.all_gather(torch.ones(8), 0)):
            assert error.startswith("rank 1 has left the group, and others wait for it in all_gather (32 bytes)")


class WithoutMemory(KernelLibrary):
    """Kernels that get no memory for a rank's end of a group."""

    def function(self, name: str) -> Callable[..., Any]:
        return (lambda *_: None) if name == "collectives_create" else super().function(name)


def test_a_rank_without_memory_for_its_end_says_so() -> None:
    with mmap.mmap(-1, 1 << 20) as memory, pytest.raises(RuntimeError, match="rank 1 has no memory left"):
        SharedMemoryCollectives(
            WithoutMemory(INSTRUCTION_SETS[0]),
            memory,
            rank=1,
            pidfds=[-1, -1],
            store=None,
            timeout_seconds=1.0,
            spin_seconds=0.0,
        )


def test_a_rank_that_has_left_does_nothing_more() -> None:
    with ends_of(2) as ends:
        ends[0].close()
        ends[0].close()
        for work in (
            ends[0].barrier,
            lambda: ends[0].all_reduce(torch.ones(2)),
            lambda: ends[0].reduce_scatter(torch.ones(2), 0),
        ):
            with pytest.raises(RuntimeError, match="this rank has left the group"):
                work()
        assert ends[0].take_times() == ({}, {}, {})
        runs = ends[0].run_timer()
        runs.begin()
        runs.end()
        assert runs.take_runs()[1] == 0
