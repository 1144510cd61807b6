"""What a rank says of its loading: now and then how far it has come."""

import threading
import time

from engine.protocol.channel import Channel
from engine.protocol.messages import Loading

REPORT_INTERVAL = 0.25  # seconds


class LoadingReporter:
    """Tells the orchestrator how many bytes of this rank's weights are loaded, at most once in `REPORT_INTERVAL`.

    What ends within the first interval is not reported at all. Once something was, the complete state is reported too,
    at once.

    Any thread may call, several at a time too. Sockets of ZeroMQ are not safe for use by several threads, though: from
    the first call until the last has returned, `control` belongs to the reporter, and the thread that made it must
    neither send nor receive there itself. It may afterwards, once the loading threads are joined.

    Args:
        control: this rank's link to the orchestrator.
        epoch: of the rank group.
        rank: this rank.
    """

    def __init__(self, control: Channel, epoch: int, rank: int) -> None:
        self._control = control
        self._epoch = epoch
        self._rank = rank
        self._lock = threading.Lock()
        self._reported_at = time.monotonic()
        self._reported_bytes: int | None = None

    def __call__(self, loaded_bytes: int, total_bytes: int) -> None:
        """Say that `loaded_bytes` of `total_bytes` are loaded by now; less than was reported before is no news."""
        with self._lock:
            if self._is_due(loaded_bytes, loaded_bytes >= total_bytes):
                self._reported_at = time.monotonic()
                self._reported_bytes = loaded_bytes
                self._control.send(Loading(self._epoch, self._rank, loaded_bytes, total_bytes))

    def _is_due(self, loaded_bytes: int, is_complete: bool) -> bool:
        if self._reported_bytes is not None:
            if loaded_bytes <= self._reported_bytes:
                return False
            if is_complete:
                return True
        return time.monotonic() - self._reported_at >= REPORT_INTERVAL
