"""The engine's process: told what to run, and certainly ended."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import msgspec

from engine.protocol.config import RUN_DIR_FILES, EngineConfig, RankSpec
from engine.protocol.logs import LogConfig
from server.early_engine import ORCHESTRATOR, EarlyEngine
from server.environment import engine_environment

TEXT_LOG = LogConfig()
LONGEST_RUN_DIR = 70  # bytes; the sockets in it have names, and their paths end at 107
STOP_SECONDS = 2.5  # for an orderly end, before everything is killed
KILL_SECONDS = 30.0  # for what was killed to be gone: memory in use takes time to be given back


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
        log: LogConfig = TEXT_LOG,
    ) -> None:
        """Start `command`, with the path of the spec appended; its standard output goes where errors go, or `stdout`.

        An orchestrator that was started `early` is told the path instead. The ranks read the weights in directory
        `weights`, or in the model's own. All write their log as `log` says.

        Raises:
            ValueError: if no folder for its sockets can be made.
        """
        self.run_dir = _make_run_dir()
        self._command = command
        self._stdout = sys.stderr if stdout is None else stdout
        self._cpus = os.sched_getaffinity(0)
        self._is_stopped = False
        self._changing = threading.Lock()  # held while the process is ended, or another takes its place
        self.spec = RankSpec(
            engine=engine,
            epoch=1,
            run_dir=str(self.run_dir),
            weights="" if weights is None else str(weights),
            log=log,
        )
        try:
            spec_path = self._write_spec()
            if early is None:
                self._process = self._start([*command, str(spec_path)], self._stdout)
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

    @property
    def is_suspended(self) -> bool:
        """Whether the orchestrator is stopped at present, as by SIGSTOP: it could be continued."""
        with contextlib.suppress(OSError):  # it has ended
            return _state_and_group(Path(f"/proc/{self.pid}/stat"))[0] == "T"
        return False

    def restart(self, epoch: int, num_kv_blocks: int | None, max_model_len: int | None) -> None:
        """Have another orchestrator begin with `epoch` in place of this one, once that and its ranks are gone.

        Takes as long as they take to go, and is for a thread that ends afterwards.

        Args:
            epoch: larger than any that the other began.
            num_kv_blocks: of the groups before; None if there was none that came to be READY.
            max_model_len: theirs.

        Raises:
            OSError: if no process can be started.
        """
        with self._changing:
            if not self._is_stopped:
                self._kill()
            if self._is_stopped:  # perhaps meanwhile: whoever stops it waits for this
                return
            self._remove_files()
            self.spec = replace(self.spec, epoch=epoch, num_kv_blocks=num_kv_blocks, max_model_len=max_model_len)
            # This process may keep to a few CPUs by now. What a thread starts has that thread's.
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, self._cpus)
            self._process = self._start([*self._command, str(self._write_spec())], self._stdout)

    def stop(self) -> None:
        """End the orchestrator and its ranks, by force if they take long, and remove the folder."""
        if self._is_stopped:  # the process id may be another's by now
            return
        self._is_stopped = True
        with self._changing:
            self._close_input()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
            self._kill()
            shutil.rmtree(self.run_dir, ignore_errors=True)

    def _kill(self) -> None:
        """Kill what is left of the orchestrator and its ranks, and wait until they are gone."""
        with contextlib.suppress(ProcessLookupError):  # raised when the whole group is gone, as it should be
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._close_input()
        deadline = time.monotonic() + KILL_SECONDS
        while not self._is_stopped and _has_members(self._process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)

    def _close_input(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _remove_files(self) -> None:
        """Remove what the orchestrator and its ranks left; the server's own socket stays."""
        kept = Path(self.spec.status_endpoint).name
        for pattern in RUN_DIR_FILES:
            for path in self.run_dir.glob(pattern):
                if path.name != kept:
                    path.unlink(missing_ok=True)


def _has_members(group: int) -> bool:
    """Say whether a process of a process group still runs. Who has ended counts no more, reaped or not."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return any(_is_running_in(group, path) for path in Path("/proc").glob("[0-9]*/stat"))


def _is_running_in(group: int, stat: Path) -> bool:
    with contextlib.suppress(OSError):  # it has ended meanwhile
        state, its_group = _state_and_group(stat)
        return its_group == group and state not in "ZX"
    return False


def _state_and_group(stat: Path) -> tuple[str, int]:
    """Return a process's state, a letter, and its process group."""
    state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
    return state, int(group)


def _make_run_dir() -> Path:
    try:
        path = tempfile.mkdtemp(prefix="ryzanstein-")
        if len(os.fsencode(path)) > LONGEST_RUN_DIR:
            Path(path).rmdir()
            path = tempfile.mkdtemp(prefix="ryzanstein-", dir="/tmp")
    except OSError as error:
        raise ValueError(f"TMPDIR: no folder for the engine's sockets can be made: {error.strerror}") from error
    return Path(path)
