"""What one rank reports of itself about once a second while it works."""

import os
import time
from pathlib import Path

import torch

from engine.checkpoint.mapped_memory import MappedMemory
from engine.communication.handler import CommunicationHandler
from engine.protocol.messages import RankStats

REPORT_INTERVAL = 1.0  # seconds


class RankStatistics:
    """Decides when a report is due: an interval after the last one, and only after work was done."""

    def __init__(
        self, group: CommunicationHandler, memory: dict[str, int], mapped: MappedMemory, *, epoch: int
    ) -> None:
        self._group = group
        self._fixed_memory = memory  # weights and KV cache, which do not change
        self._mapped = mapped
        self._epoch = epoch
        self._last = 0.0
        self._has_news = True  # where the memory went, from the start

    def note_work(self) -> None:
        """Say that something happened that is worth a report."""
        self._has_news = True

    def seconds_until_due(self) -> float | None:
        """Return the seconds until the next report, 0 if it is due, None if there is nothing to report."""
        if not self._has_news:
            return None
        return max(0.0, self._last + REPORT_INTERVAL - time.monotonic())

    def take(self) -> RankStats:
        """Return the deltas since the last report."""
        self._last = time.monotonic()
        self._has_news = False
        times = self._group.take_times()
        return RankStats(
            epoch=self._epoch,
            rank=self._group.rank,
            collectives=times.whole,
            memory={**self._fixed_memory, **self._resident_weights(), **process_memory(self._group.device)},
            waiting=times.waiting,
        )

    def _resident_weights(self) -> dict[str, int]:
        """How much of the weights is in memory: all, but where they are views of mapped files."""
        return {"weights_resident": round(self._fixed_memory["weights"] * self._mapped.resident_share())}


def process_memory(device: torch.device) -> dict[str, int]:
    """Return this process's memory in bytes: `resident` on the host, `device_allocated` on a CUDA device."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = {"resident": pages * os.sysconf("SC_PAGE_SIZE")}
    if device.type == "cuda":  # pragma: cuda
        memory["device_allocated"] = torch.cuda.memory_allocated(device)
    return memory
