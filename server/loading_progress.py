"""Shows how far the weights are loaded: a bar where standard error is a terminal, lines of the log elsewhere."""

import contextlib
import logging
import os
import threading
import time
from typing import TextIO

from engine.protocol.messages import GroupState, GroupStatus
from engine.protocol.units import format_bytes

logger = logging.getLogger(__name__)

LINE_INTERVAL = 5.0  # seconds between two lines of the log
USUAL_COLUMNS = 80  # of a terminal that does not know its width

ERASE_BELOW = "\r\x1b[J"  # from the line of the cursor to the end of the screen
UP = "\x1b[A\r"  # to the beginning of the line above


class LoadingProgress:
    """Shows what the statuses of a rank group say, until `close`.

    Args:
        stream: standard error.
        has_bar: whether a bar may be shown there, if it is a terminal.
    """

    def __init__(self, stream: TextIO, *, has_bar: bool = True) -> None:
        self._display: _Bar | _Lines = _Bar(stream) if has_bar and _is_terminal(stream) else _Lines()
        self._is_closed = False

    def follow(self, status: GroupStatus) -> None:
        """Show how far the group has come, or nothing any more once it is past loading."""
        if status.state is GroupState.STARTING and status.total_bytes > 0 and not self._is_closed:
            self._display.show(min(status.loaded_bytes, status.total_bytes), status.total_bytes)
        else:
            self._display.end()

    def close(self) -> None:
        """Leave nothing on the screen, and show nothing more."""
        self._is_closed = True
        self._display.end()


class _Lines:
    """A line of the log at most every `LINE_INTERVAL`, the first when loading has taken that long."""

    def __init__(self) -> None:
        self._last: float | None = None

    def show(self, loaded_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if self._last is None:
            self._last = now
        elif now - self._last >= LINE_INTERVAL:
            self._last = now
            share = 100 * loaded_bytes // total_bytes
            logger.info(
                "loading weights: %s of %s (%d%%)", format_bytes(loaded_bytes), format_bytes(total_bytes), share
            )

    def end(self) -> None:
        self._last = None


class _Bar:
    """tqdm's bar, drawn in the line below the cursor.

    The ranks write to the same terminal, and nobody asks us before: what they write begins in the cursor's line, which
    is empty, and the bar moves on below it. Before a line of our own log the bar is taken away, until the next status.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()  # log lines come from other threads too
        self._began: float | None = None
        self._loaded_then = 0
        self._is_drawn = False

    def show(self, loaded_bytes: int, total_bytes: int) -> None:
        from tqdm import tqdm  # noqa: PLC0415  (a start without a bar does not wait for it)

        now = time.monotonic()
        if self._began is None:
            self._began, self._loaded_then = now, loaded_bytes
            for handler in logging.getLogger().handlers:
                handler.addFilter(self._make_room)
        sizes = f"{format_bytes(loaded_bytes)} of {format_bytes(total_bytes)}"
        bar = tqdm.format_meter(
            loaded_bytes,
            total_bytes,
            now - self._began,
            ncols=_columns(self._stream) - 1,  # a full line would go on in the next
            prefix="loading weights",
            ascii=not self._stream.encoding.lower().startswith("utf"),
            unit="B",
            unit_scale=True,
            initial=self._loaded_then,
            bar_format=f"{{l_bar}}{{bar}}| {sizes} [{{elapsed}}<{{remaining}}, {{rate_fmt}}]",
        )
        with self._lock:
            self._write(f"{ERASE_BELOW}\n{bar}{UP}")
            self._is_drawn = True

    def end(self) -> None:
        if self._began is not None:
            self._began = None
            for handler in logging.getLogger().handlers:
                handler.removeFilter(self._make_room)
            self._erase()

    def _make_room(self, _: logging.LogRecord) -> bool:
        self._erase()
        return True

    def _erase(self) -> None:
        with self._lock:
            if self._is_drawn:
                self._write(ERASE_BELOW)
                self._is_drawn = False

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that has gone is no reason to stop loading
            self._stream.write(text)
            self._stream.flush()


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or USUAL_COLUMNS
    except OSError:
        return USUAL_COLUMNS
