"""What the time of steps goes to, on rank 0 and on the others, and how far the ranks are apart."""

import pickle
import time
from array import array

import pytest

from engine.communication.timing import HostRunTimer
from engine.protocol.messages import HistogramDelta
from engine.protocol.stats import PHASES, STEP_BUCKETS
from engine.worker.step_times import LAPS, FollowerStepTimes, LeaderStepTimes, NoStepTimes, RankSkew, StepDeltas


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


class Runs(HostRunTimer):
    """Runs whose times are known when a test says so."""

    def __init__(self) -> None:
        self.known = array("d")

    def begin(self) -> None:
        pass

    def end(self) -> None:
        pass

    def take_runs(self) -> "array[float]":
        known, self.known = self.known, array("d")
        return known


def sums(phases: dict[str, HistogramDelta]) -> dict[str, float]:
    return {name: delta.sum for name, delta in phases.items()}


def lead_step(clock: Clock, times: LeaderStepTimes, *laps: float) -> None:
    """Run a step as rank 0 does; each of its laps takes so long."""
    times.begin()
    for lap, seconds in zip(LAPS, laps, strict=True):
        if lap == "run":
            times.begin_run()
        clock.now += seconds
        if lap == "run":
            times.end_run()
        times.lap()


def test_the_phases_of_rank_0_add_up_to_its_step(clock: Clock) -> None:
    communicated = iter((1.0, 5.0))  # at the run's beginning and at its end
    times = LeaderStepTimes(HostRunTimer(lambda: next(communicated)))
    lead_step(clock, times, 1, 2, 16, 32, 64, 128)
    deltas = times.take()
    assert sums(deltas.phases) == dict(zip(PHASES, (1 + 64, 2, 12, 4, 32, 128), strict=True))
    assert sum(sums(deltas.phases).values()) == 1 + 2 + 16 + 32 + 64 + 128
    assert deltas.compute_seconds == [12]


def test_what_is_left_of_a_run_on_a_device_is_waited_for_while_sampling(clock: Clock) -> None:
    """Here the run is on its way after 1 s, and the device computes for 10 s, 3 of them in collectives."""
    runs = Runs()
    times = LeaderStepTimes(runs)
    lead_step(clock, times, 0, 0, 1, 12, 0, 0)
    runs.known.extend((7.0, 3.0))
    assert sums(times.take().phases) == dict(zip(PHASES, (0, 0, 7, 3, 3, 0), strict=True))


def test_steps_that_the_device_still_computes_are_counted_later(clock: Clock) -> None:
    runs = Runs()
    times = LeaderStepTimes(runs)
    lead_step(clock, times, 1, 0, 1, 12, 0, 0)
    lead_step(clock, times, 2, 0, 1, 12, 0, 0)
    assert times.take() == StepDeltas({}, [])
    runs.known.extend((7.0, 3.0))
    first = times.take()
    assert (first.phases["schedule"].sum, first.compute_seconds) == (1, [7])
    runs.known.extend((6.0, 3.0))
    second = times.take()
    assert (second.phases["schedule"].sum, second.compute_seconds) == (2, [6])


def test_what_becomes_no_step_is_not_counted(clock: Clock) -> None:
    times = LeaderStepTimes(HostRunTimer(lambda: 0.0))
    times.begin()
    clock.now += 1000
    lead_step(clock, times, 1, 1, 1, 1, 1, 1)
    assert sum(sums(times.take().phases).values()) == 6
    assert times.take() == StepDeltas({}, [])


def test_the_other_ranks_compute_and_communicate(clock: Clock) -> None:
    communicated = iter((0.0, 0.25, 0.25, 0.75))
    times = FollowerStepTimes(HostRunTimer(lambda: next(communicated)))
    for seconds in (1.0, 4.0):
        times.begin_run()
        clock.now += seconds
        times.end_run()
        clock.now += 1000  # waiting for the next step
    deltas = times.take()
    assert sums(deltas.phases) == {"compute": 0.75 + 3.5, "communicate": 0.25 + 0.5}
    assert deltas.compute_seconds == [0.75, 3.5]
    assert times.take() == StepDeltas({}, [])


def test_each_step_counts_in_the_first_bucket_whose_bound_it_does_not_exceed(clock: Clock) -> None:
    times = FollowerStepTimes(HostRunTimer(lambda: 0.0))
    for seconds in (0.0, 0.25, 0.375, 11.0):
        times.begin_run()
        clock.now += seconds
        times.end_run()
    counts = times.take().phases["compute"].counts
    bounds = (*STEP_BUCKETS, None)
    assert {bound: count for bound, count in zip(bounds, counts, strict=True) if count} == {
        STEP_BUCKETS[0]: 1,
        0.25: 1,
        0.5: 1,
        None: 1,
    }


def test_nothing_is_measured_where_that_is_off() -> None:
    times = NoStepTimes()
    times.begin()
    times.begin_run()
    times.end_run()
    times.lap()
    assert times.take() == StepDeltas({}, [])


def test_skew_is_the_slowest_ranks_computing_less_the_fastests() -> None:
    skew = RankSkew(3)
    skew.add(0, [1.0, 2.0])
    skew.add(2, [1.5, 2.0, 8.0])
    assert skew.take() is None  # nobody knows of rank 1
    skew.add(1, [1.25])
    first = skew.take()
    assert first is not None
    assert (sum(first.counts), first.sum) == (1, 0.5)
    skew.add(1, [6.0, 9.0])
    skew.add(0, [7.0])
    second = skew.take()
    assert second is not None
    assert (sum(second.counts), second.sum) == (2, 4.0 + 2.0)
    assert skew.take() is None


def test_one_rank_has_no_skew_and_its_steps_are_not_kept() -> None:
    skew = RankSkew(1)
    fresh = pickle.dumps(skew)
    skew.add(0, [1.0, 2.0])
    assert pickle.dumps(skew) == fresh
    assert skew.take() is None
