"""Which threads ranks get, on machines that are made up."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.worker.placement import (
    SPIN_SECONDS,
    SPIN_SECONDS_OF_A_QUOTA,
    Placement,
    Processors,
    asked_threads,
    place,
    read_processors,
    service_cpus,
)


def machine(num_cores: int, threads_per_core: int = 1, quota: float | None = None) -> Processors:
    """CPUs as Linux numbers them: first one of each core, then their siblings."""
    cores = tuple(tuple(range(core, num_cores * threads_per_core, num_cores)) for core in range(num_cores))
    return Processors(cores, quota)


def placements(processors: Processors, num_ranks: int, asked: int | None = None) -> list[Placement]:
    return [place(processors, num_ranks, rank, asked) for rank in range(num_ranks)]


machines = st.builds(machine, st.integers(1, 130), st.integers(1, 2), st.none() | st.floats(0.1, 300, allow_nan=False))
numbers_of_ranks = st.integers(1, 16)


@given(machines, numbers_of_ranks, st.none() | st.integers(1, 64))
def test_ranks_that_stay_on_cores_share_none_and_leave_one_for_the_server(
    processors: Processors, num_ranks: int, asked: int | None
) -> None:
    all_ranks = placements(processors, num_ranks, asked)
    pinned = [cpu for rank in all_ranks for cpu in rank.cpus or ()]
    core_of = {cpu: core for core in processors.cores for cpu in core}
    assert len({core_of[cpu] for cpu in pinned}) == len(pinned)
    left = service_cpus(processors, num_ranks, asked)
    assert bool(left) == bool(pinned)
    assert not {core_of[cpu] for cpu in left} & {core_of[cpu] for cpu in pinned}
    assert all(rank.cpus is None or len(rank.cpus) == rank.num_threads for rank in all_ranks)


@given(machines, numbers_of_ranks)
def test_all_ranks_have_as_many_threads_and_at_least_one(processors: Processors, num_ranks: int) -> None:
    [num_threads] = {rank.num_threads for rank in placements(processors, num_ranks)}
    assert num_threads >= 1
    assert num_threads == 1 or num_threads * num_ranks <= len(processors.cores)


@given(machines, numbers_of_ranks)
def test_of_the_cores_an_eighth_at_most_is_left_to_the_server_beyond_what_cannot_be_shared(
    processors: Processors, num_ranks: int
) -> None:
    if processors.binding_quota is None:
        num_cores = len(processors.cores)
        assert place(processors, num_ranks, 0).num_threads >= num_cores // num_ranks * 7 / 8


@given(machines, numbers_of_ranks, st.none() | st.integers(1, 64))
def test_threads_that_have_to_take_turns_do_not_spin(processors: Processors, num_ranks: int, asked: int | None) -> None:
    rank = place(processors, num_ranks, 0, asked)
    have_turns = rank.num_threads * num_ranks > min(len(processors.cores), processors.binding_quota or 1000)
    assert (rank.spin_seconds == 0) == have_turns


@pytest.mark.parametrize(
    ("num_cores", "num_ranks", "num_threads", "is_pinned"),
    [
        (1, 1, 1, False),
        (1, 2, 1, False),
        (2, 1, 2, False),  # all cores compute, and the server runs between steps
        (2, 2, 1, False),
        (2, 4, 1, False),
        (3, 2, 1, True),
        (4, 1, 4, False),
        (8, 1, 7, True),
        (8, 2, 4, False),
        (9, 2, 4, True),
        (16, 2, 7, True),
        (64, 1, 62, True),
        (64, 2, 31, True),
        (64, 8, 7, True),
    ],
)
def test_cores_are_divided_and_one_is_left_where_that_hardly_costs(
    num_cores: int, num_ranks: int, num_threads: int, is_pinned: bool
) -> None:
    for rank in placements(machine(num_cores), num_ranks):
        assert (rank.num_threads, rank.cpus is not None) == (num_threads, is_pinned)


def test_a_rank_of_each_half_of_a_host_stays_in_its_half() -> None:
    first, second = placements(machine(64), 2)
    assert first.cpus == tuple(range(31))
    assert second.cpus == tuple(range(32, 63))
    assert service_cpus(machine(64), 2) == (31, 63)


def test_siblings_of_a_computing_core_stay_idle() -> None:
    processors = machine(8, threads_per_core=2)
    assert place(processors, 1, 0).cpus == tuple(range(7))
    assert service_cpus(processors, 1) == (7, 15)


def test_one_core_of_two_siblings_has_one_thread() -> None:
    assert place(machine(1, threads_per_core=2), 1, 0) == Placement(1, None, SPIN_SECONDS)


@pytest.mark.parametrize(
    ("quota", "num_ranks", "expected"),
    [
        (1.5, 1, Placement(2, None, 0.0)),
        (2.0, 1, Placement(2, None, SPIN_SECONDS_OF_A_QUOTA)),
        (1.5, 2, Placement(1, None, 0.0)),
        (8.0, 2, Placement(4, None, SPIN_SECONDS_OF_A_QUOTA)),
        (0.5, 1, Placement(1, None, 0.0)),
    ],
)
def test_a_quota_is_used_rounded_up_without_pinning_or_much_spinning(
    quota: float, num_ranks: int, expected: Placement
) -> None:
    assert place(machine(64, quota=quota), num_ranks, 0) == expected


def test_a_quota_of_all_there_is_changes_nothing() -> None:
    assert place(machine(8, quota=8), 1, 0) == place(machine(8), 1, 0)


def test_threads_that_are_asked_for_are_had_and_stay_nowhere() -> None:
    assert place(machine(64), 2, 1, asked=8) == Placement(8, None, SPIN_SECONDS)
    assert place(machine(2), 2, 0, asked=2) == Placement(2, None, 0.0)


@pytest.mark.parametrize(
    ("text", "asked"),
    [("3", 3), ("4,2", 4), (" 2 ", 2), ("", None), ("0", None), ("many", None), ("-1", None), ("4294967297", None)],
)
def test_omp_num_threads_is_read_as_openmp_reads_it(text: str, asked: int | None) -> None:
    assert asked_threads({"OMP_NUM_THREADS": text}) == asked
    assert asked_threads({}) is None


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def test_cores_are_read_with_their_siblings_node_by_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    siblings = {f"cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}
    nodes = {"node/node0/cpulist": "0,2,4,6", "node/node1/cpulist": "1,3,5,7"}
    processors = read_processors(write(tmp_path, siblings | nodes), tmp_path / "no cgroup")
    assert processors == Processors(((0, 4), (2, 6), (1, 5), (3, 7)))


def test_only_what_this_process_may_use_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 5})
    siblings = {f"cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}
    root = write(tmp_path, siblings | {"cpu.max": "150000 100000"})
    assert read_processors(root, root) == Processors(((1, 5), (4,)), 1.5)


def test_without_a_word_of_the_kernel_each_cpu_is_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3})
    assert read_processors(tmp_path, tmp_path) == Processors(((0,), (3,)))


@pytest.mark.parametrize(
    ("placement", "text"),
    [
        (Placement(1, None, 0.0), "1 thread"),
        (Placement(2, None, 0.0), "2 threads"),
        (Placement(1, (3,), 0.0), "1 thread on CPU 3"),
        (Placement(4, (0, 1, 2, 8), 0.0), "4 threads on CPUs 0-2,8"),
    ],
)
def test_a_placement_is_described_in_words(placement: Placement, text: str) -> None:
    assert placement.describe() == text
