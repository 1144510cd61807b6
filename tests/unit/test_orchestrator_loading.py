"""What the ranks' words add up to, and when the server hears of it."""

import time

import pytest

from engine.orchestrator.loading import REPORT_INTERVAL, LoadingProgress
from engine.protocol.messages import Loading


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def sums(progress: LoadingProgress) -> tuple[int, int]:
    return progress.loaded_bytes, progress.total_bytes


def test_the_last_word_of_each_rank_counts() -> None:
    progress = LoadingProgress()
    assert sums(progress) == (0, 0)
    progress.hear(Loading(1, 1, 10, 100))
    assert sums(progress) == (10, 100)
    progress.hear(Loading(1, 0, 5, 200))
    progress.hear(Loading(1, 1, 30, 100))
    assert sums(progress) == (35, 300)


def test_nothing_is_due_without_news() -> None:
    progress = LoadingProgress()
    assert progress.seconds_until_due() is None
    progress.hear(Loading(1, 0, 10, 100))
    assert progress.seconds_until_due() == 0
    progress.note_report()
    assert progress.seconds_until_due() is None


def test_news_wait_for_an_interval_since_the_last_report(clock: Clock) -> None:
    progress = LoadingProgress()
    progress.note_report()
    clock.now += REPORT_INTERVAL / 4
    for rank in range(8):
        progress.hear(Loading(1, rank, 10, 100))
    assert progress.seconds_until_due() == REPORT_INTERVAL * 3 / 4
    clock.now += REPORT_INTERVAL
    assert progress.seconds_until_due() == 0


def test_the_end_waits_for_nothing() -> None:
    progress = LoadingProgress()
    progress.note_report()
    progress.hear(Loading(1, 0, 100, 100))
    assert progress.seconds_until_due() == 0
