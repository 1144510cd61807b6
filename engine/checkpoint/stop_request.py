"""SIGINT and SIGTERM, for commands that leave nothing half done: the first unwinds the stack, later ones do nothing."""

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A stop signal came.

    Not `KeyboardInterrupt` itself: where that passes through an import, Python may end with SIGINT's exit code although
    it was caught.
    """


class StopRequest:
    """Whether a stop signal came. The handlers are set by `listen`."""

    def __init__(self) -> None:
        self.has_come = False

    def listen(self) -> None:
        """Raise Stopped in the main thread at the first signal.

        Who starts this process may have blocked the signals, so that none comes before it listens.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def check(self) -> None:
        """Raise Stopped if a signal came, which some library may have swallowed."""
        if self.has_come:
            raise Stopped

    def end(self) -> None:
        """Let no signal disturb the end of the process any more."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, _: int, __: FrameType | None) -> None:
        if not self.has_come:
            self.has_come = True
            raise Stopped
