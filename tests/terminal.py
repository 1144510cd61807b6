"""A pseudo-terminal for what is started, and what a person would see on it."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import termios
import threading
from types import TracebackType
from typing import Self

_PIECES = re.compile(r"\x1b\[(\d*)([A-Z])|\r|\n|[^\x1b\r\n]+")


class Terminal:
    """`with Terminal() as terminal:` gives `terminal.end` to a process; a thread reads what comes out of it."""

    def __init__(self, columns: int = 100) -> None:
        self._ours, self.end = pty.openpty()
        fcntl.ioctl(self.end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._written = b""
        self._reader = threading.Thread(target=self._read)

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close_end()
        self._reader.join(30)
        os.close(self._ours)

    def close_end(self) -> None:
        """Let the reader end with the processes that hold the terminal."""
        if self.end >= 0:
            os.close(self.end)
            self.end = -1

    @property
    def written(self) -> str:
        """All that was written so far, control sequences included."""
        return self._written.decode(errors="replace")

    @property
    def screen(self) -> list[str]:
        """The lines that show by now, those that have scrolled away included."""
        return screen(self.written)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: nobody holds the other end any more
            while piece := os.read(self._ours, 4096):
                self._written += piece


def screen(written: str) -> list[str]:
    """Return the lines that a terminal shows after `written`, without spaces at their ends.

    Raises:
        ValueError: on a control sequence that this terminal does not know.
    """
    lines, row, column = [""], 0, 0
    for piece in _PIECES.finditer(written):
        text, count, command = piece[0], int(piece[1] or 0), piece[2]
        if text == "\r":
            column = 0
        elif text == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif command is None:
            lines[row] = lines[row].ljust(column)[:column] + text + lines[row][column + len(text) :]
            column += len(text)
        elif command == "A":
            row = max(0, row - max(count, 1))
        elif command == "J" and count == 0:
            lines[row:] = [lines[row][:column]]
        else:
            raise ValueError(f"unknown control sequence {text!r}")
    return [line.rstrip() for line in lines]
