"""When a rank says how far it has loaded: over a real channel, by a clock that stands still until it is moved."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from engine.protocol.channel import Channel
from engine.protocol.messages import Loading, Message
from engine.worker.progress import REPORT_INTERVAL, LoadingReporter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait_an_interval(self) -> None:
        self.now += REPORT_INTERVAL


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.fixture
def channels(tmp_path: Path) -> Iterator[tuple[Channel, Channel]]:
    """A rank's end and the orchestrator's."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    rank, orchestrator = Channel(context, 3), Channel(context, 3, Loading)
    rank.connect(orchestrator.bind(f"ipc://{tmp_path}/control"))
    yield rank, orchestrator
    rank.close()
    orchestrator.close()
    context.destroy(linger=0)


def received(channels: tuple[Channel, Channel]) -> list[Message]:
    """Return what the rank has said so far."""
    last = Loading(3, 9, 0, 0)
    channels[0].send(last)
    messages = []
    while (message := channels[1].receive(30)) != last:
        assert message is not None
        messages.append(message)
    return messages


def test_nothing_is_said_of_loading_that_ends_within_an_interval(
    channels: tuple[Channel, Channel], clock: Clock
) -> None:
    report = LoadingReporter(channels[0], 3, 1)
    for loaded in (0, 50, 100):
        report(loaded, 100)
    clock.now += REPORT_INTERVAL / 2
    report(100, 100)
    assert received(channels) == []


def test_a_report_comes_once_an_interval_whatever_the_number_of_calls(
    channels: tuple[Channel, Channel], clock: Clock
) -> None:
    report = LoadingReporter(channels[0], 3, 1)
    for loaded in range(1, 401):
        clock.now += REPORT_INTERVAL / 100
        report(loaded, 1000)
    assert received(channels) == [Loading(3, 1, loaded, 1000) for loaded in (100, 200, 300, 400)]


def test_the_complete_state_is_said_at_once_where_anything_was(channels: tuple[Channel, Channel], clock: Clock) -> None:
    report = LoadingReporter(channels[0], 3, 0)
    clock.wait_an_interval()
    report(10, 100)
    report(99, 100)
    report(100, 100)
    assert received(channels) == [Loading(3, 0, 10, 100), Loading(3, 0, 100, 100)]


def test_the_complete_state_is_said_once(channels: tuple[Channel, Channel], clock: Clock) -> None:
    report = LoadingReporter(channels[0], 3, 0)
    clock.wait_an_interval()
    report(100, 100)
    clock.wait_an_interval()
    report(100, 100)
    assert received(channels) == [Loading(3, 0, 100, 100)]


def test_a_word_that_was_overtaken_is_not_said(channels: tuple[Channel, Channel], clock: Clock) -> None:
    report = LoadingReporter(channels[0], 3, 0)
    clock.wait_an_interval()
    report(60, 100)
    clock.wait_an_interval()
    report(40, 100)
    assert received(channels) == [Loading(3, 0, 60, 100)]


def test_eight_threads_report_growing_numbers_and_the_end(channels: tuple[Channel, Channel]) -> None:
    report, lock = LoadingReporter(channels[0], 3, 0), threading.Lock()
    loaded = 0

    def load() -> None:
        nonlocal loaded
        for _ in range(50):
            with lock:
                loaded += 1
                now = loaded
            report(now, 400)
            time.sleep(0.02)

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    messages = received(channels)  # the thread that made the channel uses it again
    words = [(message.loaded_bytes, message.total_bytes) for message in messages if isinstance(message, Loading)]
    assert words[-1] == (400, 400)
    assert sorted(set(words)) == words
    assert len(words) >= 3
