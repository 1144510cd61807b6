"""How many threads a rank computes with, on which cores, and how long they look for work before they sleep.

Computing is bound by memory and by vector units, which the hardware threads of one core share: a rank has one thread
for each physical core of its own. Cores of one rank are neighbours, so that on a host of several NUMA nodes they are on
one of them where they can be.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.worker.host import CGROUP_ROOT, cpu_quota

SYSTEM = Path("/sys/devices/system")
SPIN_SECONDS = 100e-6  # between two layers' operations lie some 10e-6
SPIN_SECONDS_OF_A_QUOTA = 10e-6  # what is spent on waiting is not there for computing
SHARE_THAT_CAN_GIVE = 8  # cores: of so many, one less is hardly slower
MOST_THREADS = 2**31 - 1  # that OpenMP can count
CORES_OF_A_SERVICE_CORE = 32  # for each so many, the server and the orchestrator have one


@dataclass(frozen=True)
class Processors:
    """What a process may compute on."""

    cores: tuple[
        tuple[int, ...], ...
    ]  # of each physical core the CPUs, as the kernel numbers them; neighbours together
    quota: float | None = None  # how many cores' time may be used; None: all

    @property
    def binding_quota(self) -> float | None:
        """The quota, or None if it is no less than all there is."""
        has_all = self.quota is None or self.quota >= sum(map(len, self.cores))
        return None if has_all else self.quota


@dataclass(frozen=True)
class Placement:
    """The threads of one rank."""

    num_threads: int  # the one that calls included
    cpus: tuple[int, ...] | None  # the CPU of each, the caller's first; None leaves that to the kernel
    spin_seconds: float  # that a thread looks for work before it sleeps

    def describe(self) -> str:
        """Return "1 thread", or "3 threads on CPUs 0-2"."""
        threads = "1 thread" if self.num_threads == 1 else f"{self.num_threads} threads"
        if self.cpus is None:
            return threads
        return f"{threads} on CPU{'s' if self.num_threads > 1 else ''} {_ranges(self.cpus)}"


def place(processors: Processors, num_ranks: int, local_rank: int, asked: int | None = None) -> Placement:
    """Return the threads of rank number `local_rank` of `num_ranks` on one host.

    Each stays on a core of its own where all have one and a core is left for the server. Where the number is asked for,
    or a quota says how much may be used, the machine is shared with others: the kernel finds the cores that are free.
    Where threads have to take turns, none spins: it would hold up the one that it waits for.

    Args:
        processors: what all ranks together may use.
        num_ranks: on this host.
        local_rank: this rank's number among them.
        asked: the number of threads a rank that the user asks for.
    """
    num_threads = _num_threads(processors, num_ranks, asked)
    first = local_rank * (len(processors.cores) // num_ranks)
    cpus = tuple(core[0] for core in processors.cores[first : first + num_threads])
    is_pinned = bool(service_cpus(processors, num_ranks, asked))
    return Placement(num_threads, cpus if is_pinned else None, _spin_seconds(processors, num_ranks * num_threads))


def service_cpus(processors: Processors, num_ranks: int, asked: int | None = None) -> tuple[int, ...]:
    """Return the CPUs that are left for the server and the orchestrator; none where nothing stays on a core."""
    if asked is not None or processors.binding_quota is not None:
        return ()
    share, num_threads = len(processors.cores) // num_ranks, _num_threads(processors, num_ranks, None)
    left = [
        core
        for index, core in enumerate(processors.cores)
        if index >= share * num_ranks or index % share >= num_threads
    ]
    return tuple(sorted(cpu for core in left for cpu in core)) if share else ()


def _num_threads(processors: Processors, num_ranks: int, asked: int | None) -> int:
    if asked is not None:
        return asked
    num_cores, quota = len(processors.cores), processors.binding_quota
    if quota is not None:
        return max(1, min(num_cores, math.ceil(quota)) // num_ranks)
    share, left = divmod(num_cores, num_ranks)
    wanted = math.ceil(num_cores / CORES_OF_A_SERVICE_CORE)
    if share >= SHARE_THAT_CAN_GIVE and left < wanted:
        return share - math.ceil((wanted - left) / num_ranks)
    return max(1, share)


def _spin_seconds(processors: Processors, num_threads: int) -> float:
    """Return how long one of all ranks' threads may look for work."""
    quota = processors.binding_quota
    if num_threads > len(processors.cores) or (quota is not None and num_threads > quota):
        return 0.0
    return SPIN_SECONDS if quota is None else SPIN_SECONDS_OF_A_QUOTA


def read_processors(system: Path = SYSTEM, cgroup_root: Path = CGROUP_ROOT) -> Processors:
    """Return what this process may compute on. What the kernel does not tell is taken to be as simple as can be.

    Args:
        system: `/sys/devices/system`.
        cgroup_root: where the cgroup file system is mounted; see `engine.worker.host`.
    """
    nodes = {
        cpu: int(path.parent.name.removeprefix("node"))
        for path in system.glob("node/node[0-9]*/cpulist")
        for cpu in _numbers(path)
    }
    cores: dict[int, list[int]] = {}  # by the lowest of a core's CPUs, whether this process may use that one or not
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = _numbers(system / f"cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(min(siblings, default=cpu), []).append(cpu)
    ordered = sorted(cores.values(), key=lambda core: (nodes.get(core[0], 0), core[0]))
    return Processors(tuple(map(tuple, ordered)), cpu_quota(cgroup_root))


def asked_threads(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return what OMP_NUM_THREADS says of the threads of a process, or None if that is no number."""
    first = environment.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list has one for each level of nesting
    return int(first) if first.isdecimal() and 0 < int(first) <= MOST_THREADS else None


def _numbers(path: Path) -> list[int]:
    """Return the CPUs of a list as the kernel writes it, such as "0-3,8"; none if the file cannot be read."""
    try:
        parts = path.read_text().strip().split(",")
    except OSError:
        return []
    bounds = [part.split("-") for part in parts if part]
    return [cpu for bound in bounds for cpu in range(int(bound[0]), int(bound[-1]) + 1)]


def _ranges(cpus: Iterable[int]) -> str:
    """Return "0-2,8" of 0, 1, 2 and 8."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(_range(run) for run in runs)


def _range(run: Sequence[int]) -> str:
    return str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
