"""What a host or a container lets a process use, from cgroup files as the kernel writes them."""

import os
from pathlib import Path

import pytest

from engine.worker.host import free_memory, num_cpus, total_memory

GIB = 1 << 30
AVAILABLE = 8 * GIB
NO_LIMIT_V1 = 9223372036854771712  # what v1 shows where there is none


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text(f"MemTotal: {16 * GIB // 1024} kB\nMemFree: 12 kB\nMemAvailable:   {AVAILABLE // 1024} kB\n")
    return path


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5, 7})


def cgroup(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def test_without_a_cgroup_all_available_memory_is_free(tmp_path: Path, meminfo: Path) -> None:
    assert free_memory(tmp_path / "absent", meminfo) == AVAILABLE


def test_without_meminfo_the_free_pages_are_free(tmp_path: Path) -> None:
    assert 0 < free_memory(tmp_path, tmp_path / "absent") <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_v2_leaves_its_limit_less_what_is_used(tmp_path: Path, meminfo: Path) -> None:
    root = cgroup(tmp_path, {"memory.max": 4 * GIB, "memory.current": 3 * GIB, "memory.stat": "anon 5\nfile 6"})
    assert free_memory(root, meminfo) == GIB


def test_v2_counts_reclaimable_page_cache_as_free(tmp_path: Path, meminfo: Path) -> None:
    statistics = f"anon 7\nactive_file {GIB}\ninactive_file {2 * GIB}\nslab 9"
    root = cgroup(tmp_path, {"memory.max": 4 * GIB, "memory.current": 3 * GIB, "memory.stat": statistics})
    assert free_memory(root, meminfo) == 3 * GIB


def test_the_total_is_all_physical_memory_or_the_cgroups_limit(tmp_path: Path) -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert total_memory(tmp_path / "absent") == physical
    assert total_memory(cgroup(tmp_path, {"memory.max": "max"})) == physical
    assert total_memory(cgroup(tmp_path, {"memory/memory.limit_in_bytes": NO_LIMIT_V1})) == physical
    assert total_memory(cgroup(tmp_path, {"memory/memory.limit_in_bytes": 5 * 2**20})) == 5 * 2**20
    assert total_memory(cgroup(tmp_path, {"memory.max": 2**20})) == 2**20


def test_v1_leaves_its_limit_less_what_is_used_and_not_reclaimable(tmp_path: Path, meminfo: Path) -> None:
    root = cgroup(
        tmp_path,
        {
            "memory/memory.limit_in_bytes": 4 * GIB,
            "memory/memory.usage_in_bytes": 3 * GIB,
            "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}",
        },
    )
    assert free_memory(root, meminfo) == 2 * GIB


def test_the_hosts_memory_bounds_a_larger_limit(tmp_path: Path, meminfo: Path) -> None:
    assert free_memory(cgroup(tmp_path, {"memory.max": 64 * GIB, "memory.current": GIB}), meminfo) == AVAILABLE


def test_max_is_no_limit(tmp_path: Path, meminfo: Path) -> None:
    assert free_memory(cgroup(tmp_path, {"memory.max": "max", "memory.current": GIB}), meminfo) == AVAILABLE


def test_v1s_huge_number_is_no_limit(tmp_path: Path, meminfo: Path) -> None:
    root = cgroup(tmp_path, {"memory/memory.limit_in_bytes": NO_LIMIT_V1, "memory/memory.usage_in_bytes": GIB})
    assert free_memory(root, meminfo) == AVAILABLE


def test_free_memory_is_never_negative(tmp_path: Path, meminfo: Path) -> None:
    """A limit may be lowered below what is in use."""
    assert free_memory(cgroup(tmp_path, {"memory.max": GIB, "memory.current": 2 * GIB}), meminfo) == 0


def test_no_more_than_the_limit_is_free_when_the_cache_is_larger_than_the_use(tmp_path: Path, meminfo: Path) -> None:
    """The files are read one after the other, so they may disagree."""
    root = cgroup(tmp_path, {"memory.max": GIB, "memory.current": 10, "memory.stat": "inactive_file 4096"})
    assert free_memory(root, meminfo) == GIB


@pytest.mark.usefixtures("four_cores")
def test_without_a_quota_the_affinity_counts(tmp_path: Path) -> None:
    assert num_cpus(tmp_path) == 4


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(
    ("cpu_max", "cpus"),
    [
        ("max 100000", 4),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("100001 100000", 2),
        ("50000 100000", 1),
        ("800000 100000", 4),
    ],
)
def test_v2s_quota_bounds_the_cores_and_is_rounded_up(tmp_path: Path, cpu_max: str, cpus: int) -> None:
    assert num_cpus(cgroup(tmp_path, {"cpu.max": cpu_max})) == cpus


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(("quota", "cpus"), [(-1, 4), (120000, 3), (10000, 1)])
def test_v1s_quota_bounds_the_cores_and_is_rounded_up(tmp_path: Path, quota: int, cpus: int) -> None:
    assert num_cpus(cgroup(tmp_path, {"cpu/cpu.cfs_quota_us": quota, "cpu/cpu.cfs_period_us": 50000})) == cpus
