"""Shared definitions of statistics that ranks measure and the server exposes.

Bounds of histograms are upper bounds; an implicit +Inf follows.
"""

from bisect import bisect_left
from collections.abc import Sequence

from engine.protocol.messages import HistogramDelta

# Seconds of collectives.
TIME_BUCKETS: tuple[float, ...] = (
    5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 1.0, 10.0,
)  # fmt: skip
# Seconds of a step's phases, and of how far ranks are apart in a step.
STEP_BUCKETS: tuple[float, ...] = (
    5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0,
)  # fmt: skip
BATCH_SIZE_BUCKETS: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # sequences
STEP_TOKENS_BUCKETS: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

# What a step's time goes to, in the order of a step on rank 0. The others only compute and communicate; what they wait
# for a step is no part of it. Communicating includes waiting for slower ranks in a collective.
PHASES = ("schedule", "broadcast", "compute", "communicate", "sample", "emit")
BACKENDS = ("none", "shared-memory", "gloo", "nccl")
OPERATIONS = ("all_reduce", "all_gather", "gather", "broadcast", "reduce_scatter", "barrier")
HOST_MEMORY_KINDS = (
    "weights",  # this rank's, whether they are in memory or not
    "weights_resident",  # of these, in memory now
    "kv_cache",
    "resident",  # of the process, now: weights and KV cache in host memory are part of it
    "resident_peak",  # … and the most since it began
    "shared",  # of `resident`: shared with other processes, in collectives; the same memory counts on each rank
    "host_available",  # that the host, or the cgroup, can still give to anyone: the same on each rank of a host
    "host_total",  # … and what it has or grants in all
)
DEVICE_MEMORY_KINDS = ("device_allocated", "device_reserved", "device_peak")  # by torch; peak: the most allocated
MEMORY_KINDS = HOST_MEMORY_KINDS + DEVICE_MEMORY_KINDS


def bus_factor(operation: str, world_size: int) -> float:
    """Return what bytes per second of an operation are multiplied by to give its bus bandwidth, as nccl-tests does.

    That is the rate of the slowest link where the algorithm is the best one, so that figures of different numbers of
    ranks compare. The bytes of a call are nccl-tests' too: all ranks' together for `all_gather`, `gather` and
    `reduce_scatter`, those of one rank for `all_reduce` and `broadcast`. A barrier moves none.
    """
    share = (world_size - 1) / world_size
    return {"all_reduce": 2 * share, "broadcast": 1.0, "barrier": 0.0}.get(operation, share)


class Histogram:
    """Counts observations over some bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def take(self) -> HistogramDelta | None:
        """Return what was observed since the last take; None if nothing was."""
        if not any(self._counts):
            return None
        delta = HistogramDelta(self._counts, self._sum)
        self._counts, self._sum = [0] * len(self._counts), 0.0
        return delta
