"""Checks of processors, memory and limits, from files as the kernel writes them and limits that are really set."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.doctor import machine
from engine.protocol.checks import CheckStatus

OK, WARNING, FAILURE = CheckStatus.OK, CheckStatus.WARNING, CheckStatus.FAILURE


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def status_with_limit(limit: str, soft: int, check: str) -> str:
    """Return a check's status in a process that has this limit, and is nobody's root."""
    program = (
        f"import os, resource\nfrom engine.doctor import machine\n"
        f"os.geteuid = lambda: 1000\nhard = resource.getrlimit(resource.{limit})[1]\n"
        f"resource.setrlimit(resource.{limit}, ({soft}, hard))\n"
        f"print(machine.{check}.status.value)"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.usefixtures("four_cores")
def test_ranks_share_the_cores(tmp_path: Path) -> None:
    found = machine.cores(2, "cpu", write(tmp_path, {"cpu/smt/active": "0\n"}))
    assert found.status is OK
    assert "4 of" in found.detail
    assert "SMT off: 4 core(s); rank 0: 2 threads; rank 1: 2 threads" in found.detail


@pytest.mark.usefixtures("four_cores")
def test_more_ranks_than_cores_are_warned_of(tmp_path: Path) -> None:
    assert machine.cores(5, "cpu", tmp_path).status is WARNING
    assert machine.cores(5, "cuda", tmp_path).status is OK


@pytest.mark.usefixtures("four_cores")
def test_more_threads_than_cores_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = machine.cores(2, "cpu", tmp_path)
    assert found.status is WARNING
    assert "rank 1: 3 threads (OMP_NUM_THREADS): more threads than cores" in found.detail


@pytest.mark.parametrize(
    ("files", "status", "detail"),
    [
        ({}, OK, "none"),
        ({"cpu.max": "max 100000"}, OK, "none"),
        ({"cpu.max": "200000 100000"}, OK, "2 cores"),
        ({"cpu.max": "150000 100000"}, WARNING, "1.5 cores"),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, OK, "none"),
        ({"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, WARNING, "2.5 cores"),
    ],
)
def test_a_quota_that_is_no_whole_number_of_cores_is_warned_of(
    files: dict[str, str], status: CheckStatus, detail: str, tmp_path: Path
) -> None:
    found = machine.quota(write(tmp_path, files))
    assert found.status is status
    assert found.detail.startswith(detail)


@pytest.mark.parametrize(("average", "status"), [(0.2, OK), (1.0, OK), (1.1, WARNING), (9.0, WARNING)])
def test_a_machine_that_others_keep_busy_is_warned_of(average: float, status: CheckStatus) -> None:
    assert machine.load(average, 2).status is status


def test_one_memory_node_is_fine_and_several_are_warned_of(tmp_path: Path) -> None:
    write(tmp_path, {"node/node0/cpulist": "0-3\n"})
    assert machine.numa(tmp_path).status is OK
    write(tmp_path, {"node/node1/cpulist": "4-7\n"})
    found = machine.numa(tmp_path)
    assert found.status is WARNING
    assert "2 nodes: node0 has CPUs 0-3, node1 has CPUs 4-7" in found.detail


def test_memory_tells_what_the_cgroup_leaves(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemAvailable: {8 << 20} kB\n")
    assert machine.memory(tmp_path / "absent", meminfo).detail.endswith("no cgroup limit")
    write(tmp_path, {"memory.max": str(1 << 30), "memory.current": "0", "memory.stat": ""})
    assert machine.memory(tmp_path, meminfo).detail.startswith("1.0 GiB free")
    assert machine.memory(tmp_path, meminfo).detail.endswith("the cgroup leaves 1.0 GiB")


def test_shared_memory_is_written_and_mapped(tmp_path: Path) -> None:
    assert machine.shared_memory(tmp_path).status is OK
    found = machine.shared_memory(tmp_path / "absent")
    assert found.status is WARNING
    assert f"{tmp_path / 'absent'} cannot be used: No such file or directory" in found.detail


@pytest.mark.parametrize(("soft", "status"), [(64, "warning"), (280, "warning"), (281, "ok")])
def test_few_open_files_are_warned_of(soft: int, status: str) -> None:
    assert status_with_limit("RLIMIT_NOFILE", soft, "open_files(64)") == status


@pytest.mark.parametrize(("soft", "status"), [(10, "warning"), (4096, "ok")])
def test_few_processes_are_warned_of(soft: int, status: str) -> None:
    assert status_with_limit("RLIMIT_NPROC", soft, "processes(2)") == status


@pytest.mark.parametrize(("soft", "status"), [(0, "ok"), (1, "warning")])
def test_core_dumps_are_warned_of(soft: int, status: str) -> None:
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0 and soft:
        pytest.skip("core dumps cannot be switched on here")
    assert status_with_limit("RLIMIT_CORE", soft, "core_dumps()") == status


def test_locked_memory_is_told() -> None:
    assert "may be pinned" in machine.locked_memory().detail


def test_the_clock_is_read_and_its_source_named(tmp_path: Path) -> None:
    found = machine.clock(write(tmp_path, {"clocksource/clocksource0/current_clocksource": "tsc\n"}))
    assert found.status is OK
    assert "tsc, read in" in found.detail


def test_a_clock_that_was_never_set_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 12.0)
    assert machine.clock().status is WARNING


def test_a_clock_that_is_slow_to_read_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**9))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert machine.clock().status is WARNING
