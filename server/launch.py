"""The engine's process: told what to run, and certainly ended."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import msgspec

from engine.protocol.config import EngineConfig, RankSpec
from server.early_engine import ORCHESTRATOR, EarlyEngine
from server.environment import engine_environment

LONGEST_RUN_DIR = 70  # bytes; the sockets in it have names, and their paths end at 107
STOP_SECONDS = 2.5  # for an orderly end, before everything is killed


class EngineProcess:
    """A running orchestrator and its folder of sockets.

    The orchestrator ends its ranks and itself when the pipe to it closes, so that it cannot outlive this process.
    """

    def __init__(
        self,
        engine: EngineConfig,
        command: Sequence[str] = ORCHESTRATOR,
        *,
        weights: Path | None = None,
        early: EarlyEngine | None = None,
        stdout: int | IO[str] | None = None,
    ) -> None:
        """Start `command`, with the path of the spec appended; its standard output goes where errors go, or `stdout`.

        An orchestrator that was started `early` is told the path instead. The ranks read the weights in directory
        `weights`, or in the model's own.

        Raises:
            ValueError: if no folder for its sockets can be made.
        """
        self.run_dir = _make_run_dir()
        self._is_stopped = False
        self.spec = RankSpec(
            engine=engine, epoch=1, run_dir=str(self.run_dir), weights="" if weights is None else str(weights)
        )
        try:
            spec_path = self._write_spec()
            if early is None:
                self._process = self._start([*command, str(spec_path)], sys.stderr if stdout is None else stdout)
            else:
                self._process = early.tell(spec_path)
        except BaseException:
            shutil.rmtree(self.run_dir, ignore_errors=True)
            raise

    def _write_spec(self) -> Path:
        path = self.run_dir / "spec.json"
        path.write_bytes(msgspec.json.encode(self.spec))
        return path

    def _start(self, command: Sequence[str], stdout: int | IO[str]) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            command,
            env=engine_environment(),
            stdin=subprocess.PIPE,
            stdout=stdout,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The orchestrator's process id."""
        return self._process.pid

    @property
    def output(self) -> IO[bytes]:
        """What the process writes, where `stdout` was `subprocess.PIPE`."""
        assert self._process.stdout is not None
        return self._process.stdout

    def wait(self) -> int:
        """Wait until the orchestrator has exited and return its exit code."""
        return self._process.wait()

    def stop(self) -> None:
        """End the orchestrator and its ranks, by force if they take long, and remove the folder."""
        if self._is_stopped:  # the process id may be another's by now
            return
        self._is_stopped = True
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # raised when the whole group is gone, as it should be
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self.run_dir, ignore_errors=True)


def _make_run_dir() -> Path:
    try:
        path = tempfile.mkdtemp(prefix="ryzanstein-")
        if len(os.fsencode(path)) > LONGEST_RUN_DIR:
            Path(path).rmdir()
            path = tempfile.mkdtemp(prefix="ryzanstein-", dir="/tmp")
    except OSError as error:
        raise ValueError(f"TMPDIR: no folder for the engine's sockets can be made: {error.strerror}") from error
    return Path(path)
