"""What time collectives take, and what they leave to computing."""

import time
from array import array
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from engine.protocol.messages import HistogramDelta
from engine.protocol.stats import TIME_BUCKETS, Histogram


class TimeHistograms:
    """One histogram an operation over `TIME_BUCKETS`, in seconds."""

    def __init__(self) -> None:
        self._histograms: dict[str, Histogram] = {}

    def observe(self, operation: str, seconds: float) -> None:
        """Count one observation."""
        if operation not in self._histograms:
            self._histograms[operation] = Histogram(TIME_BUCKETS)
        self._histograms[operation].observe(seconds)

    def take_deltas(self) -> dict[str, HistogramDelta]:
        """Return what was observed since the last take, by operation; operations without news are left out."""
        deltas = {name: histogram.take() for name, histogram in self._histograms.items()}
        return {name: delta for name, delta in deltas.items() if delta is not None}


class RunTimer(Protocol):
    """Tells computing from communicating in a rank's runs, of which one begins when the last has ended."""

    def begin(self) -> None:
        """Say that a run begins."""
        ...

    def end(self) -> None:
        """Say that it has ended, or that all of its work is on the way to the device."""
        ...

    def take_runs(self) -> "array[float]":
        """Return the times of runs in their order, of those that are known by now and were not at the last take.

        They are in seconds, two a run: computing, and in collectives, waiting for slower ranks included.
        """
        ...


class Timer(Protocol):
    """Runs collectives and keeps their times, in seconds, and their bytes."""

    def measure(self, operation: str, num_bytes: int, collective: Callable[[], object]) -> None:
        """Run `collective`, and count its time and bytes under `operation`."""
        ...

    def take(self) -> tuple[dict[str, HistogramDelta], dict[str, int]]:
        """Return times and bytes since the last take, by operation."""
        ...

    def run_timer(self) -> RunTimer:
        """Return what tells these collectives from the rest of a run."""
        ...


class HostRunTimer:
    """Times runs that have finished when they return.

    Args:
        seconds_spent: in collectives, since some moment of the past.
    """

    def __init__(self, seconds_spent: Callable[[], float]) -> None:
        self._seconds_spent = seconds_spent
        self._began = self._spent_before = 0.0
        self._runs = array("d")

    def begin(self) -> None:
        """See `RunTimer`."""
        self._spent_before = self._seconds_spent()
        self._began = time.perf_counter()

    def end(self) -> None:
        """See `RunTimer`."""
        seconds = time.perf_counter() - self._began
        communicating = self._seconds_spent() - self._spent_before
        self._runs.extend((seconds - communicating, communicating))

    def take_runs(self) -> "array[float]":
        """See `RunTimer`."""
        runs, self._runs = self._runs, array("d")
        return runs


class HostTimer:
    """Times collectives that have finished when they return, waiting for slower ranks included."""

    def __init__(self) -> None:
        self._histograms = TimeHistograms()
        self._bytes: dict[str, int] = {}
        self._seconds = 0.0  # of all, since the beginning

    def measure(self, operation: str, num_bytes: int, collective: Callable[[], object]) -> None:
        """See `Timer`."""
        began = time.perf_counter()
        collective()
        seconds = time.perf_counter() - began
        self._histograms.observe(operation, seconds)
        self._bytes[operation] = self._bytes.get(operation, 0) + num_bytes
        self._seconds += seconds

    def take(self) -> tuple[dict[str, HistogramDelta], dict[str, int]]:
        """See `Timer`."""
        num_bytes, self._bytes = self._bytes, {}
        return self._histograms.take_deltas(), num_bytes

    def run_timer(self) -> HostRunTimer:
        """See `Timer`."""
        return HostRunTimer(lambda: self._seconds)


class NoTimer:
    """Runs collectives, and keeps nothing."""

    def measure(self, _operation: str, _num_bytes: int, collective: Callable[[], object]) -> None:
        """See `Timer`."""
        collective()

    def take(self) -> tuple[dict[str, HistogramDelta], dict[str, int]]:
        """See `Timer`."""
        return {}, {}

    def run_timer(self) -> HostRunTimer:
        """See `Timer`."""
        return HostRunTimer(lambda: 0.0)


class Event(Protocol):
    """What `torch.cuda.Event` does."""

    def record(self) -> None:
        """Put the event behind what the current stream has to do already."""
        ...

    def query(self) -> bool:
        """Return whether the device has come to it."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Return the milliseconds from this event to a later one, both of which the device has come to."""
        ...


def _event_with_time() -> Event:
    event: Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # pragma: cuda
    return event  # pragma: cuda


class _Span(NamedTuple):
    """A collective on the device."""

    operation: str
    num_bytes: int
    began: Event
    ended: Event


class _Batch(NamedTuple):
    """What the device has to do one after the other: collectives, and the run that they are part of."""

    collectives: list[_Span]
    run: tuple[Event, Event] | None

    @property
    def last(self) -> Event:
        return self.collectives[-1].ended if self.run is None else self.run[1]


class CudaTimer:
    """Times collectives and runs by events in the current stream, which are read once the device has come to them.

    Nothing here waits for the device. One stream comes to its events in their order, so that a run's end says of all
    its collectives that they have ended. Events are used again: there are as many as are on their way at a time.
    Collectives inside a CUDA graph's capture are not timed.

    Args:
        new_event: makes one that has a time.
        is_capturing: whether a graph is being captured.
    """

    def __init__(
        self,
        new_event: Callable[[], Event] = _event_with_time,
        is_capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing,
    ) -> None:
        self._new_event = new_event
        self._is_capturing = is_capturing
        self._spare: list[Event] = []
        self._collectives: list[_Span] = []  # since the last batch
        self._batches: deque[_Batch] = deque()  # that the device may not have done yet
        self._run_began: Event | None = None
        self._histograms = TimeHistograms()
        self._bytes: dict[str, int] = {}
        self._runs = array("d")

    def measure(self, operation: str, num_bytes: int, collective: Callable[[], object]) -> None:
        """See `Timer`: the time is counted by the first `end` or `take` after the device has come so far."""
        if self._is_capturing():
            collective()
            return
        began = self._record()
        collective()
        self._collectives.append(_Span(operation, num_bytes, began, self._record()))

    def take(self) -> tuple[dict[str, HistogramDelta], dict[str, int]]:
        """See `Timer`."""
        self._close_batch(None)
        self._read_events()
        num_bytes, self._bytes = self._bytes, {}
        return self._histograms.take_deltas(), num_bytes

    def run_timer(self) -> "CudaTimer":
        """See `Timer`."""
        return self

    def begin(self) -> None:
        """See `RunTimer`."""
        self._close_batch(None)
        self._run_began = self._record()

    def end(self) -> None:
        """See `RunTimer`."""
        assert self._run_began is not None
        self._close_batch((self._run_began, self._record()))
        self._run_began = None
        self._read_events()

    def take_runs(self) -> "array[float]":
        """See `RunTimer`."""
        self._read_events()
        runs, self._runs = self._runs, array("d")
        return runs

    def _record(self) -> Event:
        event = self._spare.pop() if self._spare else self._new_event()
        event.record()
        return event

    def _close_batch(self, run: tuple[Event, Event] | None) -> None:
        if self._collectives or run is not None:
            self._batches.append(_Batch(self._collectives, run))
            self._collectives = []

    def _read_events(self) -> None:
        while self._batches and self._batches[0].last.query():
            self._count(self._batches.popleft())

    def _count(self, batch: _Batch) -> None:
        communicating = 0.0
        for operation, num_bytes, began, ended in batch.collectives:
            seconds = began.elapsed_time(ended) / 1000
            self._histograms.observe(operation, seconds)
            self._bytes[operation] = self._bytes.get(operation, 0) + num_bytes
            communicating += seconds
            self._spare += (began, ended)
        if batch.run is not None:
            seconds = batch.run[0].elapsed_time(batch.run[1]) / 1000
            self._runs.extend((max(0.0, seconds - communicating), communicating))
            self._spare += batch.run
