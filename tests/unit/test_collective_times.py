"""Histograms of collectives' times."""

import pytest

from engine.communication.timing import HostTimer, TimeHistograms
from engine.protocol.stats import TIME_BUCKETS


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


def test_a_collective_that_fails_raises_and_is_not_counted() -> None:
    timer = HostTimer()
    with pytest.raises(ZeroDivisionError):
        timer.measure("gather", lambda: 1 // 0)
    assert timer.take_deltas() == {}
