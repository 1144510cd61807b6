"""Locks on files that the kernel gives back when their holder is gone, however it went."""

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

LOCK_FILE = ".lock"


class FileLock:
    """An exclusive lock on a file. It is open for writing, without which network file systems lock nothing."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def try_take(cls, path: Path, *, make: bool = False) -> Self | None:
        """Return the lock, or None while another process, or another part of this one, holds it.

        Args:
            path: of the file.
            make: it where it is not there.

        Raises:
            OSError: if the file cannot be opened, or its file system has no locks.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if make else 0), 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def is_of(self, path: Path) -> bool:
        """Whether the locked file is the one at `path`, not one that was removed meanwhile."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), path.stat())
        except FileNotFoundError:
            return False

    def write(self, content: bytes) -> None:
        """Write what the file holds from now on."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, content, 0)

    def close(self) -> None:
        """Give the lock back, also where a child process has inherited the open file."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)


class DirectoryLock:
    """Keeps others that ask for it out of a directory while it is open, by a lock on the file `.lock` in there.

    The file stays: who removed it could not know that nobody has just opened it.

    Raises:
        ValueError: (on entering) naming the directory, and the process that works there; or that it cannot be locked.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> Self:
        path = self._directory / LOCK_FILE
        try:
            lock = FileLock.try_take(path, make=True)
            if lock is None:
                raise ValueError(f"{self._directory}: {path.read_text() or 'another process'} is writing there now")
            lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        except OSError as error:
            raise ValueError(f"{self._directory}: cannot be locked: {error.strerror}") from error
        self._lock = lock
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.close()
