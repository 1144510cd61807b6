"""Processors, memory and limits, as this process sees them."""

import mmap
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

from engine.protocol.checks import Check, Finding, ok, warning
from engine.protocol.config import EngineConfig
from engine.protocol.open_files import check_open_files
from engine.protocol.units import format_bytes, format_seconds
from engine.worker import host
from engine.worker.placement import asked_threads, place, read_processors

SECTION = "machine"
SYSTEM = Path("/sys/devices/system")
SHARED_MEMORY = Path("/dev/shm")
SMALLEST_SHARED_MEMORY = 64 << 20  # what container runtimes give by default, and NCCL finds too little
BUSY_SHARE = 0.5  # of the cores, taken by others
FILES_OF_ITS_OWN = 25  # that an idle server has open, as measured; ranks' are tried out by starting them
THREADS_EACH = 16  # that a rank starts, beside its cores' threads; measured: 8 on two cores
EARLIEST = 1_735_689_600  # 2025-01-01 in seconds: before it a clock was never set
SLOW_CLOCK = 1e-6  # seconds for one reading
CLOCK_ROUNDS, CLOCK_READINGS = 20, 500


def checks(engine: EngineConfig) -> list[Check]:
    """Return this section's checks."""
    num_ranks = engine.tensor_parallel_size
    return [
        Check(SECTION, "cores", lambda: cores(num_ranks, engine.device)),
        Check(SECTION, "CPU quota", quota),
        Check(SECTION, "load", lambda: load(os.getloadavg()[0], host.num_cpus())),
        Check(SECTION, "NUMA", numa),
        Check(SECTION, "memory", memory),
        Check(SECTION, "shared memory", shared_memory),
        Check(SECTION, "open files", lambda: open_files(engine.max_num_seqs)),
        Check(SECTION, "processes", lambda: processes(num_ranks)),
        Check(SECTION, "locked memory", locked_memory),
        Check(SECTION, "core dumps", core_dumps),
        Check(SECTION, "clock", clock),
    ]


def cores(num_ranks: int, device: str, system: Path = SYSTEM) -> Finding:
    """Compare cores with ranks and their threads."""
    processors, asked = read_processors(system), asked_threads()
    smt = _read(system / "cpu/smt/active")
    siblings = {"1": ", two threads a core (SMT)", "0": ", SMT off"}.get(smt, "")
    placements = [place(processors, num_ranks, rank, asked) for rank in range(num_ranks)]
    ranks = "; ".join(f"rank {rank}: {placement.describe()}" for rank, placement in enumerate(placements))
    source = " (OMP_NUM_THREADS)" if asked is not None else ""
    usable = sum(map(len, processors.cores))
    found = f"{usable} of {os.cpu_count()} CPUs usable{siblings}: {len(processors.cores)} core(s); {ranks}{source}"
    if device != "cuda" and sum(placement.num_threads for placement in placements) > host.num_cpus():
        return warning(f"{found}: more threads than cores", "lower --tensor-parallel-size, or OMP_NUM_THREADS if set")
    return ok(found)


def quota(cgroup_root: Path = host.CGROUP_ROOT) -> Finding:
    """Tell the cgroup's CPU quota, which ranks' threads are made to fit."""
    granted = host.cpu_quota(cgroup_root)
    if granted is None:
        return ok("none")
    found = f"{granted:g} cores"
    if granted != int(granted):
        return warning(
            f"{found}: ranks use it rounded up, and are paused when it is used up", "grant a whole number of cores"
        )
    return ok(found)


def load(average: float, cpus: int) -> Finding:
    """Say whether others keep the cores busy."""
    found = f"{average:.1f} of {cpus} core(s) busy in the last minute"
    if average > BUSY_SHARE * cpus:
        return warning(f"{found}: what is measured below is less than the machine can do", "look for what else runs")
    return ok(found)


def numa(system: Path = SYSTEM) -> Finding:
    """Tell the memory nodes."""
    nodes = sorted((system / "node").glob("node[0-9]*"))
    if len(nodes) < 2:
        return ok("one node: all memory is equally near")
    cpus = ", ".join(f"{node.name} has CPUs {_read(node / 'cpulist')}" for node in nodes)
    return warning(
        f"{len(nodes)} nodes: {cpus}; ranks are not bound to them",
        "start one service a node with numactl --cpunodebind=N --membind=N where latency matters",
    )


def memory(cgroup_root: Path = host.CGROUP_ROOT, meminfo: Path = host.MEMINFO) -> Finding:
    """Tell what can still be taken."""
    free, left = host.free_memory(cgroup_root, meminfo), host.cgroup_memory_left(cgroup_root)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = "no cgroup limit" if left is None or left > total else f"the cgroup leaves {format_bytes(left)}"
    return ok(f"{format_bytes(free)} free of {format_bytes(total)}, {limit}")


def shared_memory(folder: Path = SHARED_MEMORY) -> Finding:
    """Write to shared memory and map it, as libraries of collectives do."""
    hint = "start the container with --shm-size=1g, or mount a tmpfs there"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\1" * mmap.PAGESIZE)
            file.flush()
            with mmap.mmap(file.fileno(), mmap.PAGESIZE) as mapped:
                mapped[0] = 2
    except OSError as error:
        return warning(f"{folder} cannot be used: {error.strerror}; NCCL needs it", hint)
    usage = shutil.disk_usage(folder)
    found = f"{folder}: {format_bytes(usage.free)} free of {format_bytes(usage.total)}, written and mapped"
    return ok(found) if usage.free > SMALLEST_SHARED_MEMORY else warning(f"{found}; NCCL may need more", hint)


def open_files(max_num_seqs: int) -> Finding:
    """Compare the limit of open files with connections: each takes one.

    Raises:
        ValueError: when a service could not even start.
    """
    check_open_files()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = _or_unlimited(soft) - FILES_OF_ITS_OWN
    found = f"{_limit(soft)} (hard limit {_limit(hard)})"
    if room < 4 * max_num_seqs:
        return warning(
            f"{found}: room for some {room} connections, with {max_num_seqs} sequences running at once",
            "raise it: ulimit -n, LimitNOFILE or --ulimit nofile",
        )
    return ok(found)


def processes(num_ranks: int) -> Finding:
    """Compare the limit of processes and threads of this user with what ranks start."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    needed = (num_ranks + 2) * (THREADS_EACH + host.num_cpus())
    found = f"{_limit(soft)} (hard limit {_limit(hard)})"
    if _or_unlimited(soft) < needed and os.geteuid() != 0:  # it does not bind root
        return warning(f"{found}, and ranks start up to {needed} threads", "raise it: ulimit -u or LimitNPROC")
    return ok(found)


def locked_memory() -> Finding:
    """Tell how much memory may be pinned."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return ok(f"{format_bytes(soft) if soft != resource.RLIM_INFINITY else 'unlimited'} may be pinned; none is on CPUs")


def core_dumps() -> Finding:
    """Warn where a rank that crashes would write all its memory to disk."""
    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    if soft == 0:
        return ok("off")
    size = "unlimited" if soft == resource.RLIM_INFINITY else f"up to {format_bytes(soft)}"
    pattern = _read(Path("/proc/sys/kernel/core_pattern"))
    return warning(
        f"{size}, to {pattern}: a rank that crashes writes its memory there, weights and prompts included",
        "ulimit -c 0, if nobody wants it",
    )


def clock(system: Path = SYSTEM) -> Finding:
    """Read the clocks: the date goes into responses, and each time-out and latency hangs on the monotonic one."""
    each = min(_clock_reading() for _ in range(CLOCK_ROUNDS))  # the best: a round may be interrupted
    source = _read(system / "clocksource/clocksource0/current_clocksource") or "unknown"
    found = f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}; {source}, read in {format_seconds(each)}"
    if time.time() < EARLIEST:
        return warning(f"{found}: the date cannot be right", "set the clock")
    if each > SLOW_CLOCK:
        return warning(f"{found}: slow to read", "a virtual machine should offer tsc or kvm-clock")
    return ok(found)


def _clock_reading() -> float:
    """Return the seconds that reading the monotonic clock takes."""
    began = time.perf_counter()
    for _ in range(CLOCK_READINGS):
        time.perf_counter()
    return (time.perf_counter() - began) / CLOCK_READINGS


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _or_unlimited(value: int) -> int:
    return 2**62 if value == resource.RLIM_INFINITY else value
