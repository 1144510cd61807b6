"""Histograms of how long collectives take."""

import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol

import torch

from engine.protocol.messages import HistogramDelta
from engine.protocol.stats import TIME_BUCKETS


class TimeHistograms:
    """One histogram an operation over `TIME_BUCKETS`, in seconds."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, operation: str, seconds: float) -> None:
        """Count one observation."""
        counts = self._counts.setdefault(operation, [0] * (len(TIME_BUCKETS) + 1))
        counts[bisect_left(TIME_BUCKETS, seconds)] += 1
        self._sums[operation] = self._sums.get(operation, 0.0) + seconds

    def take_deltas(self) -> dict[str, HistogramDelta]:
        """Return what was observed since the last take, by operation; operations without news are left out."""
        deltas = {name: HistogramDelta(counts, self._sums[name]) for name, counts in self._counts.items()}
        self._counts, self._sums = {}, {}
        return deltas


class Timer(Protocol):
    """Runs collectives and keeps their times."""

    def measure(self, operation: str, collective: Callable[[], object]) -> None:
        """Run `collective` and count its time under `operation`."""
        ...

    def take_deltas(self) -> dict[str, HistogramDelta]:
        """Return what was measured since the last take, by operation."""
        ...


class HostTimer:
    """Times collectives that have finished when they return, waiting for slower ranks included."""

    def __init__(self) -> None:
        self._histograms = TimeHistograms()

    def measure(self, operation: str, collective: Callable[[], object]) -> None:
        """Run `collective` and count its time under `operation`."""
        started = time.perf_counter()
        collective()
        self._histograms.observe(operation, time.perf_counter() - started)

    def take_deltas(self) -> dict[str, HistogramDelta]:
        """Return what was measured since the last take, by operation."""
        return self._histograms.take_deltas()


class CudaTimer:  # pragma: cuda
    """Times collectives by events in the current stream, which are read later: nothing here waits for the device.

    Collectives inside a CUDA graph's capture are not timed.
    """

    def __init__(self) -> None:
        self._histograms = TimeHistograms()
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._spare: list[torch.cuda.Event] = []

    def measure(self, operation: str, collective: Callable[[], object]) -> None:
        """Queue `collective`; its time is counted by the first `take_deltas` after it has ended."""
        if torch.cuda.is_current_stream_capturing():
            collective()
            return
        started, ended = self._event(), self._event()
        started.record()
        collective()
        ended.record()
        self._pending.append((operation, started, ended))

    def take_deltas(self) -> dict[str, HistogramDelta]:
        """Return the times of what has ended since the last take, by operation."""
        running = []
        for operation, started, ended in self._pending:
            if ended.query():  # type: ignore[no-untyped-call]
                self._histograms.observe(operation, started.elapsed_time(ended) / 1000)
                self._spare += (started, ended)
            else:
                running.append((operation, started, ended))
        self._pending = running
        return self._histograms.take_deltas()

    def _event(self) -> torch.cuda.Event:
        return self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
