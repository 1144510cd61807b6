"""SIGINT and SIGTERM, for commands that leave nothing half done."""

import os
import signal
from types import FrameType

from engine.protocol.errors import EXIT_INTERRUPTED

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A stop signal came."""


class StopRequest:
    """Whether a stop signal came. The first one counts, later ones do nothing."""

    def __init__(self) -> None:
        self._has_come = False
        self._unwinds = False

    def listen(self) -> None:
        """End the process at the first signal, at once: modules that are being imported cannot be interrupted safely.

        Who starts this process may have blocked the signals, so that none comes before it listens.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def unwind(self) -> None:
        """From now on, raise Stopped in the main thread at the first signal, so that all is cleared away."""
        self._unwinds = True

    def check(self) -> None:
        """Raise Stopped if a signal came; for other threads, and in case a library has swallowed it."""
        if self._has_come:
            raise Stopped

    def end(self) -> None:
        """Let no signal disturb the end of the process any more."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, _: int, __: FrameType | None) -> None:
        if not self._unwinds:
            os._exit(EXIT_INTERRUPTED)
        if not self._has_come:
            self._has_come = True
            raise Stopped
