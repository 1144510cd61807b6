"""What one rank reports of itself: about once a second while it works, and seldom while it does not."""

import time
from pathlib import Path

import torch

from engine.checkpoint.mapped_memory import MappedMemory
from engine.communication.handler import CommunicationHandler
from engine.protocol.messages import RankReport, RankStats
from engine.worker.host import free_memory, total_memory
from engine.worker.step_times import StepTimes

REPORT_INTERVAL = 1.0  # seconds
IDLE_REPORT_INTERVAL = 15.0  # without work: memory changes then, too, as while weights are still read ahead
STATUS_FIELDS = {"resident": "VmRSS", "resident_peak": "VmHWM", "shared": "RssShmem"}  # of /proc/self/status


class RankStatistics:
    """Decides when a report is due: an interval after the last one, which is longer when no work was done.

    Args:
        group: whose collectives are reported.
        memory: weights and KV cache, in bytes, which do not change.
        mapped: the files that weights are views of.
        step_times: of this rank's loop.
        epoch: of the rank group.
    """

    def __init__(
        self,
        group: CommunicationHandler,
        memory: dict[str, int],
        mapped: MappedMemory,
        step_times: StepTimes,
        *,
        epoch: int,
    ) -> None:
        self._group = group
        self._fixed_memory = memory
        self._mapped = mapped
        self._step_times = step_times
        self._epoch = epoch
        self._last = 0.0
        self._has_news = True  # where the memory went, from the start

    def note_work(self) -> None:
        """Say that something happened that is worth a report."""
        self._has_news = True

    def seconds_until_due(self) -> float:
        """Return the seconds until the next report, 0 if it is due."""
        interval = REPORT_INTERVAL if self._has_news else IDLE_REPORT_INTERVAL
        return max(0.0, self._last + interval - time.monotonic())

    def take(self) -> RankReport:
        """Return the deltas since the last report."""
        self._last = time.monotonic()
        self._has_news = False
        steps, times = self._step_times.take(), self._group.take_times()
        resident_share = self._mapped.resident_share()
        stats = RankStats(
            epoch=self._epoch,
            rank=self._group.rank,
            collectives=times.whole,
            memory={
                **self._fixed_memory,
                "weights_resident": round(self._fixed_memory["weights"] * resident_share),
                **process_memory(self._group.device),
            },
            waiting=times.waiting,
            backend=self._group.carrier,
            world_size=self._group.world_size,
            collective_bytes=times.num_bytes,
            phases=steps.phases,
            weights_resident_ratio=resident_share,
        )
        return RankReport(self._epoch, stats, steps.compute_seconds)


def process_memory(device: torch.device) -> dict[str, int]:
    """Return this process's memory in bytes, and its host's, by kinds of `engine.protocol.stats`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    memory = {kind: int(fields[name].split()[0]) * 1024 for kind, name in STATUS_FIELDS.items()}  # kB means KiB
    host = {"host_available": free_memory(), "host_total": total_memory()}
    return memory | host | device_memory(device)


def device_memory(device: torch.device) -> dict[str, int]:
    """Return this process's memory in bytes on a CUDA device; nothing on another."""
    if device.type != "cuda":
        return {}
    return {  # pragma: cuda
        "device_allocated": torch.cuda.memory_allocated(device),
        "device_reserved": torch.cuda.memory_reserved(device),
        "device_peak": torch.cuda.max_memory_allocated(device),
    }
