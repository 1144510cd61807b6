"""Shows how far a conversion or a check has come: a bar on a terminal, lines of the log elsewhere."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from engine.protocol.units import format_bytes

LINE_INTERVAL = 5.0  # seconds between two lines of the log

logger = logging.getLogger(__name__)


class Progress:
    """Counts bytes that are done. `start` may be called once, `advance` from several threads.

    Args:
        title: what is being done, such as `writing`.
        is_shown: whether anybody wants to know.
        check: is called whenever something is done; what it raises ends the work.
    """

    def __init__(self, title: str, *, is_shown: bool, check: Callable[[], None]) -> None:
        self._title = title
        self._is_shown = is_shown
        self._check = check
        self._bar: tqdm[Any] | None = None
        self._done = self._total = 0
        self._last_line = time.monotonic()
        self._lock = threading.Lock()

    def start(self, total: int) -> Callable[[int], None]:
        """Say how many bytes there are; return what is told of those that are done."""
        self._total = total
        if self._is_shown and sys.stderr.isatty():
            self._bar = tqdm(
                total=total, desc=self._title, unit="B", unit_scale=True, unit_divisor=1024, leave=False, miniters=1
            )
        return self.advance

    def advance(self, count: int) -> None:
        """Count `count` bytes more."""
        self._check()
        with self._lock:
            self._done += count
            if self._bar is not None:
                self._bar.update(count)
            elif self._is_shown:
                self._write_line()

    def _write_line(self) -> None:
        now = time.monotonic()
        if now - self._last_line >= LINE_INTERVAL:
            self._last_line = now
            share = 100 * self._done // max(1, self._total)
            logger.info("%s: %s of %s (%d%%)", self._title, format_bytes(self._done), format_bytes(self._total), share)

    def close(self) -> None:
        """Leave nothing on the screen."""
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def shown_progress(title: str, *, is_shown: bool, check: Callable[[], None]) -> Iterator[Progress]:
    """Give a `Progress` that is closed after the block."""
    progress = Progress(title, is_shown=is_shown and sys.stderr is not None, check=check)
    with logging_redirect_tqdm(), contextlib.closing(progress):  # lines of the log go above the bar
        yield progress
