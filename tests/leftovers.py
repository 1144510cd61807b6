"""What must not remain when a service or an engine has ended."""

import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

SHARED_MEMORY = Path("/dev/shm")


def still_running(processes: Iterable[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Return the processes that have not ended in time. One that nobody has asked for its exit code yet has ended."""
    deadline = time.monotonic() + seconds
    while (alive := [process for process in processes if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return alive


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class SharedMemory:
    """Notes the files of shared memory that are there, so that `check` finds what is new."""

    def __init__(self) -> None:
        self._before = set(SHARED_MEMORY.iterdir())

    def check(self, seconds: float = 10.0) -> None:
        """Check that nothing new is left. Other tests' files, of which some are there for seconds, are waited for."""
        deadline = time.monotonic() + seconds
        while not (after := set(SHARED_MEMORY.iterdir())) <= self._before and time.monotonic() < deadline:
            time.sleep(0.1)
        assert after <= self._before


class Leftovers:
    """Notes what is there before, so that `check` finds what is new. `folder` is for TMPDIR of what is started."""

    def __enter__(self) -> Self:
        self._temporary = tempfile.TemporaryDirectory(prefix="rz-", dir="/tmp")  # short: socket paths have a limit
        self.folder = Path(self._temporary.name)
        self._shared_memory = SharedMemory()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._temporary.cleanup()

    @property
    def environment(self) -> dict[str, str]:
        """Variables for what is started."""
        return {"TMPDIR": str(self.folder)}

    def check(self, processes: Iterable[psutil.Process], seconds: float = 5.0) -> None:
        """Check that no process lives, no file is left in `folder` and no shared memory is new."""
        assert still_running(list(processes), seconds) == []
        assert list(self.folder.iterdir()) == []
        self._shared_memory.check()
