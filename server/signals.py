"""SIGTERM and SIGINT: the first one stops the service, the second hurries it where it takes its time."""

import contextlib
import signal
from collections.abc import Callable, Generator
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequested(KeyboardInterrupt):
    """A stop signal came.

    Not `KeyboardInterrupt` itself: where that passes through `exec` of a text, as in the making of a dataclass, Python
    ends with SIGINT's exit code although it was caught.
    """


def on_stop_signal(*actions: Callable[[], object]) -> None:
    """Call the first action at the first SIGTERM or SIGINT, the next at the next, and ignore those that follow."""
    remaining = list(actions)

    def handle(_: int, __: FrameType | None) -> None:
        if not remaining:  # it came while another was being handled
            return
        action = remaining.pop(0)
        if not remaining:
            # Not SIG_IGN yet: Python writes an error for a signal that has arrived and that nobody handles any more.
            for number in STOP_SIGNALS:
                signal.signal(number, _do_nothing)
        action()

    for number in STOP_SIGNALS:
        signal.signal(number, handle)


def _do_nothing(_: int, __: FrameType | None) -> None:
    pass


def ignore_stop_signals() -> None:
    """Let no SIGTERM or SIGINT disturb an end that is under way, or change its exit code."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def stop_signals_delayed() -> Generator[None, None, None]:
    """Let a SIGTERM or SIGINT that comes inside the block take effect at its end."""
    arrived: list[int] = []
    before = [(number, signal.signal(number, lambda number, _: arrived.append(number))) for number in STOP_SIGNALS]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])


def unwind() -> NoReturn:
    """Unwind the stack, so that whatever was started is ended."""
    raise StopRequested


def are_stop_signals_ignored() -> bool:
    """Return whether all that something is done at have come."""
    return signal.getsignal(signal.SIGTERM) in (_do_nothing, signal.SIG_IGN)
