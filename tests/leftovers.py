"""What must not remain when a service or an engine has ended."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

SHARED_MEMORY = Path("/dev/shm")


class Leftovers:
    """Notes what is there before, so that `check` finds what is new. `folder` is for TMPDIR of what is started."""

    def __enter__(self) -> Self:
        self._temporary = tempfile.TemporaryDirectory(prefix="rz-", dir="/tmp")  # short: socket paths have a limit
        self.folder = Path(self._temporary.name)
        self._shared_memory = set(SHARED_MEMORY.iterdir())
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
        _, alive = psutil.wait_procs(list(processes), timeout=seconds)
        assert alive == []
        assert list(self.folder.iterdir()) == []
        assert set(SHARED_MEMORY.iterdir()) <= self._shared_memory
