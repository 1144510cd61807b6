import signal
import sys
from collections.abc import Iterator

import pytest

from server.signals import STOP_SIGNALS, are_stop_signals_ignored, ignore_stop_signals, on_stop_signal


@pytest.fixture(autouse=True)
def keep_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send_at_once(*numbers: int) -> None:
    """Have several signals arrive before any of them is handled."""
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    for number in numbers:
        signal.raise_signal(number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def test_the_first_signal_acts_and_those_that_came_with_it_or_follow_do_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    complaints: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    actions: list[str] = []
    on_stop_signal(lambda: actions.append("stop"))
    assert not are_stop_signals_ignored()
    send_at_once(*STOP_SIGNALS)
    assert are_stop_signals_ignored()
    send_at_once(*STOP_SIGNALS)
    assert actions == ["stop"]
    assert complaints == []


def test_each_signal_has_its_own_action_and_those_beyond_do_nothing() -> None:
    actions: list[str] = []
    on_stop_signal(lambda: actions.append("drain"), lambda: actions.append("stop"))
    send_at_once(STOP_SIGNALS[0])
    assert actions == ["drain"]
    assert not are_stop_signals_ignored()
    send_at_once(*STOP_SIGNALS)
    send_at_once(*STOP_SIGNALS)
    assert actions == ["drain", "stop"]
    assert are_stop_signals_ignored()


def test_two_signals_at_once_are_two() -> None:
    actions: list[str] = []
    on_stop_signal(lambda: actions.append("drain"), lambda: actions.append("stop"))
    send_at_once(*STOP_SIGNALS)
    assert actions == ["drain", "stop"]


def test_signals_can_be_ignored_before_any_came() -> None:
    on_stop_signal(pytest.fail)
    ignore_stop_signals()
    send_at_once(*STOP_SIGNALS)
    assert are_stop_signals_ignored()
