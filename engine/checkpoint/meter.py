"""How far loading has come."""

import threading
from collections.abc import Callable

from engine.checkpoint.agreement import GroupAgreement

Progress = Callable[[int, int], None]  # bytes done, and of how many


class Meter:
    """Adds up what is done, and looks whether another rank has failed meanwhile.

    Args:
        agreement: knows of the other ranks.
        progress: is told of bytes done, and of how many.
    """

    def __init__(self, agreement: GroupAgreement, progress: Progress) -> None:
        self._agreement = agreement
        self._progress = progress
        self._done = self._total = 0
        self._lock = threading.Lock()

    def start(self, total: int) -> None:
        """Say how much there is to do, in bytes."""
        self._total = total

    def advance(self, count: int) -> None:
        """Say that so many bytes more are done.

        Raises:
            PeerFailedError: if another rank has failed.
        """
        with self._lock:  # checksums are computed in threads
            self._done += count
            self._agreement.check()
            self._progress(self._done, self._total)
