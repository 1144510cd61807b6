"""The orchestrator's process, started before anybody knows what it is to run: torch is imported below it meanwhile.

Nothing that takes time is imported here.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from server.environment import engine_environment

ORCHESTRATOR: tuple[str, ...] = (sys.executable, "-P", "-m", "engine.orchestrator")


class EarlyEngine:
    """An orchestrator that waits to be told what to run. It ends with this process, as one that runs something does.

    Raises:
        OSError: if no process can be started.
    """

    def __init__(self) -> None:
        self._is_told = False
        self._process = subprocess.Popen(
            ORCHESTRATOR, env=engine_environment(), stdin=subprocess.PIPE, stdout=sys.stderr, start_new_session=True
        )

    def tell(self, spec_path: Path) -> "subprocess.Popen[bytes]":
        """Have it run what the file says, and return the process, which from here on is the caller's to end."""
        assert self._process.stdin is not None
        self._is_told = True
        with contextlib.suppress(BrokenPipeError):  # it is gone, as whoever waits for it will see
            self._process.stdin.write(os.fsencode(spec_path) + b"\n")
            self._process.stdin.flush()
        return self._process

    def stop(self) -> None:
        """End it and all below it at once, if it was told nothing: there is nothing yet that wants an orderly end."""
        if self._is_told:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
