"""Locks of the shard cache's entries: shared while a service uses one, exclusive to write or remove it.

The kernel gives a lock back when the last process that holds its file open is gone, however it went. The time at which
the lock file was changed is when its entry was used last.
"""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Self


class EntryLock:
    """One lock, held until it is closed."""

    def __init__(self, file: int) -> None:
        self._file = file

    @classmethod
    def try_shared(cls, path: Path) -> Self | None:
        """Return the lock, or None while somebody writes or removes the entry.

        Raises:
            OSError: if its file can neither be made nor opened.
        """
        return cls._try(path, fcntl.LOCK_SH)

    @classmethod
    def try_exclusive(cls, path: Path) -> Self | None:
        """Return the lock, or None while anybody holds it.

        Raises:
            OSError: if its file can neither be made nor opened.
        """
        return cls._try(path, fcntl.LOCK_EX)

    @classmethod
    def _try(cls, path: Path, kind: int) -> Self | None:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # of a cache that came with a read-only image
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        except BaseException:
            os.close(file)
            raise
        return cls(file)

    def fileno(self) -> int:
        """Return the open file, for a process that is to hold the lock too."""
        return self._file

    def touch(self) -> None:
        """Note that the entry is used now, where that can be noted."""
        with contextlib.suppress(OSError):
            os.utime(self._file)

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._file)
