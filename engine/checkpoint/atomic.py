"""Directories that are there whole or not at all, also after a crash.

A new directory is written inside of a hidden *holder* beside its destination, and renamed when it is whole:

    checkpoints/
        model-step-1000/                           the destination
        .model-step-1000.tmp-4711-0a1b2c3d/        a holder
            lock                                   locked as long as its writer lives
            model-step-1000/                       what is written, or was replaced and is being removed

What nobody locks was left by a writer that died; the next writer beside it removes it.
"""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from engine.checkpoint.file_lock import FileLock
from engine.protocol.errors import file_error

HOLDER_LOCK = "lock"
_HOLDER = re.compile(r"\..+\.tmp-\d+-[0-9a-f]{8}")
_FULL_OR_READ_ONLY = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # only writing fails like this
_AT_FDCWD = -100  # linux/fcntl.h: paths are taken as they are
_NOREPLACE, _EXCHANGE = 1, 2  # linux/fs.h: renameat2's flags
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # how file systems say that they do not know a flag


class NewDirectory:
    """A directory that appears at `destination` when it is whole. Use it as a context manager.

        with NewDirectory(Path("checkpoints/model-step-1000")) as new:
            (new.path / "metadata.json").write_bytes(content)

    At the block's end everything in it is put on the disk, then it takes its place in one step; a reader, or a crash at
    any moment, finds the old directory or the new one. If the block raises, nothing has changed. What earlier writers
    left beside it when they were killed is removed.

    Args:
        destination: whose parent is there.
        replace: also a directory that is there.

    Raises:
        ValueError: (on entering or leaving) naming the path, if something else is there, or it cannot be written; also
            for a full disk that the block came upon.
    """

    path: Path  # to write into

    def __init__(self, destination: Path, *, replace: bool = False) -> None:
        self._destination = destination
        self._replace = replace
        self._is_in_place = False

    def __enter__(self) -> Self:
        self._check()
        remove_leftovers(self._destination.parent)
        try:
            self._holder = _Holder(self._destination)
            with _removed_on_error(self._holder):
                self.path = self._holder.path / self._destination.name
                self.path.mkdir()
                self._check_exchange()
        except OSError as error:
            raise unwritable(self._destination, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None and not self._is_in_place:
                self.commit()
            elif isinstance(error, OSError) and error.errno in _FULL_OR_READ_ONLY:
                raise unwritable(self._destination, error) from error
        finally:
            self._holder.remove()

    def commit(self) -> None:
        """Put the directory in its place now, not at the block's end; nothing can be written into it any more.

        Raises:
            ValueError: see above.
        """
        try:
            _sync_all(self.path)
            self._rename()
            self._is_in_place = True
            _sync(self._destination.parent)
        except OSError as error:
            raise unwritable(self._destination, error) from error

    def _check(self) -> None:
        there = self._destination.is_symlink() or self._destination.exists()
        if there and not self._replace:
            raise ValueError(f"{self._destination}: is there already")
        if there and (self._destination.is_symlink() or not self._destination.is_dir()):
            raise ValueError(f"{self._destination}: is there already, and is no directory")

    def _check_exchange(self) -> None:
        """Find out now whether directories can be exchanged, rather than when everything is written."""
        if self._destination.exists():
            other = self.path.with_name("exchange")
            other.mkdir()
            self._exchange(other)
            other.rmdir()

    def _rename(self) -> None:
        self._check()
        if self._destination.exists():
            self._exchange(self._destination)
        else:
            _rename(self.path, self._destination)

    def _exchange(self, other: Path) -> None:
        try:
            _renameat2(self.path, other, _EXCHANGE)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            problem = "is there already, and its file system cannot exchange directories; remove it first"
            raise ValueError(f"{self._destination}: {problem}") from error


def remove_directory(directory: Path) -> None:
    """Remove a directory so that it is there whole or not at all.

    Raises:
        OSError: if it cannot be moved, or its parent not be written.
    """
    holder = _Holder(directory)
    try:
        directory.rename(holder.path / directory.name)
        _sync(directory.parent)
    finally:
        holder.remove()


def remove_leftovers(parent: Path) -> None:
    """Remove what writers in `parent` left when they were killed. What cannot be removed stays."""
    for path in _entries(parent):
        if _HOLDER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # of another user, or just removed by another writer
                _remove_if_left(path)


def unwritable(path: str | Path, error: OSError) -> ValueError:
    """Return the error of a path that cannot be written."""
    return file_error(f"{path}: cannot be written: {error.strerror or error}", error)


class _Holder:
    """A hidden directory beside `destination`, locked until it is removed.

    Raises:
        OSError: if it cannot be made or locked.
    """

    def __init__(self, destination: Path) -> None:
        taken = None
        while taken is None:
            self.path = destination.with_name(f".{destination.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
            self.path.mkdir()
            taken = self._try_lock()
        self._lock = taken

    def _try_lock(self) -> FileLock | None:
        """Return its lock; None if it was taken for a leftover, in the moment in which it had none."""
        path = self.path / HOLDER_LOCK
        try:
            lock = FileLock.try_take(path, make=True)
        except FileNotFoundError:
            return None
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise
        if lock is None or lock.is_of(path):
            return lock
        lock.close()
        return None

    def remove(self) -> None:
        """Remove it, and all that is in it."""
        _remove_holder(self.path)
        self._lock.close()


@contextlib.contextmanager
def _removed_on_error(holder: _Holder) -> Iterator[None]:
    try:
        yield
    except BaseException:
        holder.remove()
        raise


def _remove_if_left(holder: Path) -> None:
    """Remove a holder that nobody has locked."""
    try:
        lock = FileLock.try_take(holder / HOLDER_LOCK)
    except FileNotFoundError:  # its writer came no further, or is about to lock it, and will make another
        holder.rmdir()
        return
    if lock is not None:
        _remove_holder(holder)
        lock.close()


def _remove_holder(holder: Path) -> None:
    """Remove a holder and all that is in it, its lock last: without that nobody would know it for one."""
    for path in _entries(holder):
        if path.name != HOLDER_LOCK:
            shutil.rmtree(path, ignore_errors=True)
    if [path.name for path in _entries(holder)] == [HOLDER_LOCK]:
        with contextlib.suppress(OSError):
            (holder / HOLDER_LOCK).unlink()
            holder.rmdir()


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []


def _rename(source: Path, destination: Path) -> None:
    """Rename a directory; what has come to `destination` meanwhile stays, if the file system can see to that."""
    try:
        _renameat2(source, destination, _NOREPLACE)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        source.rename(destination)


def _renameat2(source: Path, destination: Path, flags: int) -> None:
    """Rename in a way that Python's library does not know. See man 2 renameat2."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(destination), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(source), None, str(destination))


def _sync_all(directory: Path) -> None:
    """Wait until a directory and all that is in it are on the disk."""
    for path in (*directory.rglob("*"), directory):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
