"""Locks that the kernel gives back."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from engine.checkpoint.file_lock import DirectoryLock, FileLock

HOLD = """
import sys, time
from pathlib import Path
from engine.checkpoint.file_lock import DirectoryLock
with DirectoryLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(300)
"""


def test_a_lock_is_held_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    lock = FileLock.try_take(path, make=True)
    assert lock is not None
    assert FileLock.try_take(path) is None
    lock.close()
    again = FileLock.try_take(path)
    assert again is not None
    again.close()


def test_a_lock_is_given_back_although_a_child_has_inherited_its_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    lock = FileLock.try_take(path, make=True)
    assert lock is not None
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        theirs.recv(1)  # until the test is over
        os._exit(0)
    theirs.close()
    lock.close()
    again = FileLock.try_take(path)
    ours.close()
    os.waitpid(child, 0)
    assert again is not None
    again.close()


def test_a_lock_knows_whether_its_file_is_still_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    lock = FileLock.try_take(path, make=True)
    assert lock is not None
    assert lock.is_of(path)
    path.unlink()
    assert not lock.is_of(path)
    path.touch()
    assert not lock.is_of(path)
    lock.close()


def test_a_locked_directory_names_who_works_there(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        expected = f"^{tmp_path}: process {holder.pid} on {socket.gethostname()} is writing there now$"
        with pytest.raises(ValueError, match=expected), DirectoryLock(tmp_path):
            pass
        holder.kill()
    with DirectoryLock(tmp_path):  # the dead keep nothing locked
        pass


def test_a_directory_that_is_not_there_cannot_be_locked(tmp_path: Path) -> None:
    expected = r"none: cannot be locked: No such file or directory$"
    with pytest.raises(ValueError, match=expected), DirectoryLock(tmp_path / "none"):
        pass
