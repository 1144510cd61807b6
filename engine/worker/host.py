"""What this host, or the container on it, lets a process use.

A container's cgroup limits are read at the root of its cgroup file system. Under cgroup v2 that is the container's own
group, since it has a cgroup namespace; under v1 it is, because the container's group is what is mounted there. A group
nested below that root, such as a systemd service's, is not looked for: what its limits keep from a process has to be
said with --num-kv-blocks or --kv-cache-memory, and OMP_NUM_THREADS.
"""

import math
import os
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def free_memory(cgroup_root: Path = CGROUP_ROOT, meminfo: Path = MEMINFO) -> int:
    """Return the bytes that can still be taken: the host's available memory, or what the cgroup leaves of it.

    Page cache that the kernel would drop under pressure counts as free in both.

    Args:
        cgroup_root: where cgroup v2, or v1 with a folder a controller, is mounted.
        meminfo: `/proc/meminfo`.
    """
    left = cgroup_memory_left(cgroup_root)
    available = _available(meminfo)
    return available if left is None else min(available, left)


def total_memory(cgroup_root: Path = CGROUP_ROOT) -> int:
    """Return the bytes that the host has, or that the cgroup grants of them, used or not."""
    limits = (_number(_words(cgroup_root / path)) for path in ("memory.max", "memory/memory.limit_in_bytes"))
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *(limit for limit in limits if limit is not None)])


def cgroup_memory_left(cgroup_root: Path = CGROUP_ROOT) -> int | None:
    """Return the bytes that the cgroup still lets be taken, or None if it has no limit."""
    memory = cgroup_root / "memory"
    bounds = (
        _memory_left(cgroup_root, limit="memory.max", used="memory.current", reclaimable="inactive_file"),
        _memory_left(
            memory, limit="memory.limit_in_bytes", used="memory.usage_in_bytes", reclaimable="total_inactive_file"
        ),
    )
    return min((bound for bound in bounds if bound is not None), default=None)


def num_cpus(cgroup_root: Path = CGROUP_ROOT) -> int:
    """Return how many cores this process may keep busy: its affinity, or the cgroup's quota rounded up; at least 1."""
    cpus = len(os.sched_getaffinity(0))
    quota = cpu_quota(cgroup_root)
    return cpus if quota is None else min(cpus, math.ceil(quota))


def cpu_quota(cgroup_root: Path = CGROUP_ROOT) -> float | None:
    """Return how many cores' time the cgroup grants, or None if it has no quota."""
    quotas = _words(cgroup_root / "cpu.max")  # "quota period", in microseconds
    quotas_v1 = _words(cgroup_root / "cpu" / "cpu.cfs_quota_us") + _words(cgroup_root / "cpu" / "cpu.cfs_period_us")
    bounds = [bound for bound in (_cpus_of_quota(quotas), _cpus_of_quota(quotas_v1)) if bound is not None]
    return min(bounds, default=None)


def _memory_left(folder: Path, *, limit: str, used: str, reclaimable: str) -> int | None:
    """Return the bytes that a memory cgroup may still take, or None if it has no limit."""
    most, taken = _number(_words(folder / limit)), _number(_words(folder / used))
    if most is None or taken is None:
        return None
    statistics = _words(folder / "memory.stat")  # name, value, name, value, …
    cache = int(statistics[statistics.index(reclaimable) + 1]) if reclaimable in statistics else 0
    return max(0, most - max(0, taken - cache))


def _cpus_of_quota(words: list[str]) -> float | None:
    """Return the cores of `[quota, period]`, or None if that is no limit."""
    quota, period = _number(words[:1]), _number(words[1:2])
    if quota is None or period is None or quota <= 0 or period <= 0:  # a quota of -1 is none
        return None
    return quota / period


def _available(meminfo: Path) -> int:
    words = _words(meminfo)
    if "MemAvailable:" in words:
        return int(words[words.index("MemAvailable:") + 1]) * 1024  # it says kB and means KiB
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _words(path: Path) -> list[str]:
    """Return a file's words; none if it is not there."""
    try:
        return path.read_text().split()
    except OSError:
        return []


def _number(words: list[str]) -> int | None:
    """Return the number that the first word is; None if there is none, such as in "max"."""
    try:
        return int(words[0])
    except (IndexError, ValueError):
        return None
