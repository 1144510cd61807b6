"""Directories that appear whole or not at all, whatever ends the program that writes them.

Writing is into a temporary sibling, which becomes the directory by one rename. A writer holds a lock on its temporary
directory as long as it lives, so that what a dead one left can be told from what a living one is writing.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

RENAME_EXCHANGE = 2
AT_FDCWD = -100
LOCK_FILE = ".lock"


class NewDirectory:
    """A directory that is `destination` after the block, if the block ends well; else nothing has changed.

        with NewDirectory(destination) as new:
            (new.path / "metadata.json").write_bytes(…)

    Files that are written are their writers' to bring to the disk; directories are brought there here.

    Args:
        destination: of the new directory; its parent is there.
        replace: whether it may be there already: then it is exchanged for the new one at once, and removed.

    Raises:
        ValueError: (on entering and leaving) naming the directory, if it is there, or cannot be written.
    """

    def __init__(self, destination: Path, *, replace: bool = False) -> None:
        self.destination = destination
        self.path = destination.with_name(f".{destination.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        self._replace = replace
        self._lock = -1

    def __enter__(self) -> Self:
        if not self._replace and (self.destination.exists() or self.destination.is_symlink()):
            raise ValueError(f"{self.destination}: is there already; nothing is overwritten")
        with _named(self.destination):
            remove_leftovers(self.destination.parent)
            self.path.mkdir()
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with _named(self.destination):
                    self._commit()
            elif isinstance(error, OSError):
                raise _unwritable(self.destination, error) from error
        finally:
            shutil.rmtree(self.path, ignore_errors=True)  # what failed, or what was replaced
            os.close(self._lock)

    def _commit(self) -> None:
        os.fsync(self._lock)
        if self._replace and self.destination.exists():
            _exchange(self.path, self.destination)
        else:
            _rename_to_nothing(self.path, self.destination)
        sync_directory(self.destination.parent)


class DirectoryLock:
    """Keeps others from writing checkpoints into a directory meanwhile.

    Args:
        directory: made if it is not there.

    Raises:
        ValueError: (on entering) naming the directory and who holds it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptor = -1

    def __enter__(self) -> Self:
        with _named(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(self._descriptor)
            raise ValueError(f"{self._directory}: {holder} is writing a checkpoint there") from None
        os.truncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


def remove_leftovers(parent: Path) -> None:
    """Remove temporary directories whose writers are gone."""
    for path in parent.glob(".*.tmp-*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: somebody lives
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Wait until a directory's entries are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> None:
    """Swap two directories at once: at no moment is one of the names missing."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = (os.fsencode(path) for path in (first, second))
    if libc.renameat2(AT_FDCWD, next(names), AT_FDCWD, next(names), RENAME_EXCHANGE):
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOSYS):
            raise ValueError(
                f"{second}: its file system cannot replace a directory at once; remove it, or take another"
            )
        raise OSError(code, os.strerror(code), str(second))


def _rename_to_nothing(source: Path, destination: Path) -> None:
    try:
        source.rename(destination)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise ValueError(f"{destination}: is there by now; nothing is overwritten") from error
        raise


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn the errors of a disk into one line that names the directory."""
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"{path}: cannot be written: {error.strerror}")
