"""Times of collectives and of runs, on the host and by a device's events."""

import time
from array import array
from collections.abc import Callable

import pytest

from engine.communication.base import call_bytes
from engine.communication.timing import CudaTimer, HostRunTimer, HostTimer, NoTimer, TimeHistograms
from engine.protocol.stats import OPERATIONS, TIME_BUCKETS, Histogram, bus_factor


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now

    def take(self, seconds: float) -> Callable[[], None]:
        """Return something to do that takes so long."""

        def work() -> None:
            self.now += seconds

        return work


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


# --- histograms ------------------------------------------------------------------------------------------------------


def test_a_time_counts_in_the_first_bucket_whose_bound_it_does_not_exceed() -> None:
    histograms = TimeHistograms()
    for seconds in (0.0, TIME_BUCKETS[0], TIME_BUCKETS[1], TIME_BUCKETS[-1] + 1):
        histograms.observe("gather", seconds)
    delta = histograms.take_deltas()["gather"]
    assert delta.counts == [2, 1, *[0] * (len(TIME_BUCKETS) - 2), 1]
    assert delta.sum == pytest.approx(TIME_BUCKETS[0] + TIME_BUCKETS[1] + TIME_BUCKETS[-1] + 1)


def test_deltas_hold_only_what_came_since_the_last_take() -> None:
    histograms = TimeHistograms()
    histograms.observe("gather", 1.0)
    histograms.take_deltas()
    histograms.observe("broadcast", 2.0)
    assert {name: delta.sum for name, delta in histograms.take_deltas().items()} == {"broadcast": 2.0}


def test_a_histogram_of_nothing_is_none() -> None:
    histogram = Histogram((1, 2))
    assert histogram.take() is None
    histogram.observe(2)
    delta = histogram.take()
    assert delta is not None
    assert (delta.counts, delta.sum) == ([0, 1, 0], 2)
    assert histogram.take() is None


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_bytes_and_bus_bandwidth_are_those_of_nccl_tests() -> None:
    """By its PERFORMANCE.md and each operation's source: size, and busbw / algbw, for 4 ranks of 10 bytes each."""
    expected = {
        "all_reduce": (10, 2 * 3 / 4),
        "all_gather": (40, 3 / 4),
        "gather": (40, 3 / 4),
        "reduce_scatter": (40, 3 / 4),
        "broadcast": (10, 1.0),
    }
    assert {name: (call_bytes(name, 10, 4), bus_factor(name, 4)) for name in expected} == expected
    assert {*expected, "barrier"} == set(OPERATIONS)
    assert bus_factor("barrier", 4) == 0


# --- on the host -----------------------------------------------------------------------------------------------------


def test_a_collective_is_counted_with_its_time_and_bytes(clock: Clock) -> None:
    timer = HostTimer()
    timer.measure("gather", 100, clock.take(0.25))
    timer.measure("gather", 20, clock.take(0.5))
    times, num_bytes = timer.take()
    assert (sum(times["gather"].counts), times["gather"].sum, num_bytes) == (2, 0.75, {"gather": 120})
    assert timer.take() == ({}, {})


def test_a_collective_that_fails_raises_and_is_not_counted() -> None:
    timer = HostTimer()
    with pytest.raises(ZeroDivisionError):
        timer.measure("gather", 8, lambda: 1 // 0)
    assert timer.take() == ({}, {})


def test_a_run_is_computing_but_for_its_collectives(clock: Clock) -> None:
    timer = HostTimer()
    timer.measure("broadcast", 8, clock.take(7.0))  # before any run: of none
    runs = timer.run_timer()
    for computing, communicating in ((1.0, 0.25), (2.0, 0.0)):
        runs.begin()
        clock.take(computing)()
        timer.measure("all_reduce", 8, clock.take(communicating))
        runs.end()
    assert runs.take_runs() == array("d", (1.0, 0.25, 2.0, 0.0))
    assert runs.take_runs() == array("d")


def test_where_nothing_is_timed_collectives_run_all_the_same() -> None:
    timer, calls = NoTimer(), list[str]()
    timer.measure("gather", 8, lambda: calls.append("gather"))
    assert (calls, timer.take()) == (["gather"], ({}, {}))


def test_a_rank_alone_only_computes(clock: Clock) -> None:
    runs = HostRunTimer(lambda: 0.0)
    runs.begin()
    clock.take(3.0)()
    runs.end()
    assert runs.take_runs() == array("d", (3.0, 0.0))


# --- on a device -----------------------------------------------------------------------------------------------------


class Device:
    """A stream of work that is queued at once and done when the device is let go on."""

    def __init__(self) -> None:
        self.queued = self.done = 0.0  # milliseconds of work
        self.num_events = 0

    def event(self) -> "ScriptedEvent":
        self.num_events += 1
        return ScriptedEvent(self)

    def queue(self, milliseconds: float) -> Callable[[], None]:
        def work() -> None:
            self.queued += milliseconds

        return work

    def finish(self) -> None:
        self.done = self.queued


class ScriptedEvent:
    """Like torch.cuda.Event: it may be asked for a time only once the device has come to it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.at = float("nan")

    def record(self) -> None:
        self.at = self._device.queued

    def query(self) -> bool:
        return self.at <= self._device.done

    def elapsed_time(self, end_event: "ScriptedEvent") -> float:
        assert self.query()
        assert end_event.query()
        return end_event.at - self.at


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def cuda(device: Device) -> CudaTimer:
    return CudaTimer(device.event, lambda: False)


def run_once(device: Device, timer: CudaTimer, computing: float, *collectives: float) -> None:
    timer.begin()
    device.queue(computing)()
    for milliseconds in collectives:
        timer.measure("all_reduce", 16, device.queue(milliseconds))
    timer.end()


def test_what_a_device_has_not_done_is_counted_later(device: Device, cuda: CudaTimer) -> None:
    run_once(device, cuda, 4, 1, 2)
    assert (cuda.take_runs(), cuda.take()) == (array("d"), ({}, {}))
    device.finish()
    run_once(device, cuda, 8, 4)
    assert cuda.take_runs() == pytest.approx((0.004, 0.003))
    times, num_bytes = cuda.take()
    assert times["all_reduce"].sum == pytest.approx(0.003)
    assert num_bytes == {"all_reduce": 32}
    device.finish()
    assert cuda.take_runs() == pytest.approx((0.008, 0.004))
    assert cuda.take()[0]["all_reduce"].sum == pytest.approx(0.004)


def test_collectives_outside_of_runs_are_counted_and_are_no_part_of_them(device: Device, cuda: CudaTimer) -> None:
    cuda.measure("broadcast", 8, device.queue(500))
    run_once(device, cuda, 4, 1)
    cuda.measure("barrier", 0, device.queue(250))
    device.finish()
    times, num_bytes = cuda.take()
    assert {name: delta.sum for name, delta in times.items()} == pytest.approx(
        {"broadcast": 0.5, "all_reduce": 0.001, "barrier": 0.25}
    )
    assert num_bytes == {"broadcast": 8, "all_reduce": 16, "barrier": 0}
    assert cuda.take_runs() == pytest.approx((0.004, 0.001))


def test_events_are_used_again_once_the_device_has_passed_them(device: Device, cuda: CudaTimer) -> None:
    for _ in range(20):
        run_once(device, cuda, 4, 1, 2)
        device.finish()
    assert device.num_events <= 2 * 6  # of a run that is on its way, and of the next


def test_what_a_graph_captures_is_not_timed(device: Device) -> None:
    timer = CudaTimer(device.event, lambda: True)
    timer.measure("gather", 8, device.queue(5))
    assert (device.queued, device.num_events, timer.take()) == (5, 0, ({}, {}))
