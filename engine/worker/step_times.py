"""What the time of steps goes to, on each rank, and how far the ranks are apart."""

import time
from array import array
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.communication.timing import RunTimer
from engine.protocol.messages import HistogramDelta
from engine.protocol.stats import PHASES, STEP_BUCKETS

Seconds = NDArray[np.float64]

_BOUNDS = np.array(STEP_BUCKETS)

# Of a step of rank 0: what ends at each lap, in their order.
LAPS = ("schedule", "broadcast", "run", "sample", "apply", "emit")


class StepDeltas(NamedTuple):
    """What was measured since the last take."""

    phases: dict[str, HistogramDelta]  # by `stats.PHASES`, over `STEP_BUCKETS`
    compute_seconds: list[float]  # of each step in its order; begins with that after the last of the take before


class StepTimes(Protocol):
    """Measures the steps of one rank."""

    def begin(self) -> None:
        """Say that a step may begin here: rank 0 has stopped waiting for something to do."""
        ...

    def lap(self) -> None:
        """Say that what rank 0 does next of `LAPS` is done. The last ends the step."""
        ...

    def begin_run(self) -> None:
        """Say that this rank's part of a step begins."""
        ...

    def end_run(self) -> None:
        """Say that it has ended, or that all of its work is on the way to the device."""
        ...

    def take(self) -> StepDeltas:
        """Return what was measured since the last take, of steps whose times are all known."""
        ...


class NoStepTimes:
    """Measures nothing."""

    def begin(self) -> None:
        """See `StepTimes`."""

    def lap(self) -> None:
        """See `StepTimes`."""

    def begin_run(self) -> None:
        """See `StepTimes`."""

    def end_run(self) -> None:
        """See `StepTimes`."""

    def take(self) -> StepDeltas:
        """See `StepTimes`."""
        return StepDeltas({}, [])


class FollowerStepTimes(NoStepTimes):
    """Of a rank that only computes and communicates.

    Args:
        runs: of this rank.
    """

    def __init__(self, runs: RunTimer) -> None:
        self._runs = runs

    def begin_run(self) -> None:
        """See `StepTimes`."""
        self._runs.begin()

    def end_run(self) -> None:
        """See `StepTimes`."""
        self._runs.end()

    def take(self) -> StepDeltas:
        """See `StepTimes`."""
        runs = _rows(self._runs.take_runs(), 2).T
        return StepDeltas(_histograms(("compute", "communicate"), runs), runs[0].tolist())


class LeaderStepTimes(FollowerStepTimes):
    """Of rank 0, where the phases of a step add up to all of it.

    Args:
        runs: of this rank.
    """

    def __init__(self, runs: RunTimer) -> None:
        super().__init__(runs)
        self._moments: list[float] = []  # of the present step: its beginning, and each lap's end
        self._steps = array("d")  # the moments of those that have ended

    def begin(self) -> None:
        """See `StepTimes`."""
        self._moments = [time.perf_counter()]

    def lap(self) -> None:
        """See `StepTimes`."""
        self._moments.append(time.perf_counter())
        if len(self._moments) > len(LAPS):
            self._steps.extend(self._moments)

    def take(self) -> StepDeltas:
        """See `StepTimes`."""
        compute, communicate = _rows(self._runs.take_runs(), 2).T
        width = len(LAPS) + 1
        known = len(compute) * width  # not of steps that the device still computes
        laps = np.diff(_rows(self._steps[:known], width)).T
        del self._steps[:known]
        schedule, broadcast, run, sample, apply, emit = laps
        # On a device a run ends when it is on its way: what is left of it then is waited for while sampling.
        sampling = np.maximum(run + sample - compute - communicate, 0.0)
        phases = np.stack((schedule + apply, broadcast, compute, communicate, sampling, emit))
        return StepDeltas(_histograms(PHASES, phases), compute.tolist())


class RankSkew:
    """How far the ranks are apart: in each step, what the slowest takes to compute less what the fastest does.

    Args:
        world_size: how many ranks there are.
    """

    def __init__(self, world_size: int) -> None:
        self._seconds: list[list[float]] = [[] for _ in range(world_size)]

    def add(self, rank: int, compute_seconds: list[float]) -> None:
        """Take a rank's next steps."""
        if len(self._seconds) > 1:  # one rank alone is never compared
            self._seconds[rank] += compute_seconds

    def take(self) -> HistogramDelta | None:
        """Return the skew, over `STEP_BUCKETS`, of steps that all ranks have told of by now; None if there is none."""
        count = min(map(len, self._seconds))
        if count == 0:
            return None
        seconds = np.array([of_rank[:count] for of_rank in self._seconds])
        self._seconds = [of_rank[count:] for of_rank in self._seconds]
        return _histograms(("skew",), np.ptp(seconds, axis=0, keepdims=True))["skew"]


def _rows(numbers: "array[float]", width: int) -> Seconds:
    """Return `[num_rows, width]`."""
    return np.array(numbers).reshape(-1, width)


def _histograms(names: Sequence[str], seconds: Seconds) -> dict[str, HistogramDelta]:
    """Return the histogram of each row of `seconds` [num_names, num_steps]; without steps there are none."""
    if seconds.shape[1] == 0:
        return {}
    width = len(STEP_BUCKETS) + 1
    # All rows at once: one second's steps are few, so that the calls are what takes time.
    buckets = np.searchsorted(_BOUNDS, seconds) + width * np.arange(len(names))[:, np.newaxis]
    counts = np.bincount(buckets.ravel(), minlength=width * len(names)).reshape(-1, width)
    rows = zip(names, counts.tolist(), seconds.sum(axis=1).tolist(), strict=True)
    return {name: HistogramDelta(of_name, total) for name, of_name, total in rows}
