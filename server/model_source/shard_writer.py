"""Writes an entry of the shard cache in the background, in a process that takes only what nobody else wants."""

import ctypes
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Sequence

import msgspec

from engine.protocol.commands import ShardCommand
from engine.protocol.environment import PARENT_PID_VARIABLE
from server.environment import engine_environment

WRITER = (sys.executable, "-P", "-m", "engine.checkpoint", "shard")
LOWEST_PRIORITY = 19
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}  # linux: arch/*/unistd; the C library has no function for it
_IOPRIO_OF_PROCESS, _IOPRIO_IDLE = 1, 3 << 13  # linux/ioprio.h


class ShardWriter:
    """One run of `python -m engine.checkpoint shard`, which writes a whole entry or none."""

    def __init__(self, command: Sequence[str] = WRITER) -> None:
        self._command = command
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self.is_stopped = False

    def run(self, command: ShardCommand, inherited: Sequence[int]) -> str | None:
        """Write the entry, unless `stop` is called first; return what went wrong, or None.

        The thread that calls this must live until it returns: the process dies with it.

        Args:
            command: what is written.
            inherited: open files that stay open as long as the process lives.
        """
        with self._lock:
            if self.is_stopped:
                return "stopped"
            self._process = process = self._start(command, inherited)
        _, words = process.communicate()
        lines = words.decode(errors="replace").split("\n")
        if process.returncode == 0:
            return None
        told = next((line for line in reversed(lines) if line.strip()), "")
        return told.removeprefix("ryzanstein: error: ") or f"its process ended with code {process.returncode}"

    def _start(self, command: ShardCommand, inherited: Sequence[int]) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [*self._command, msgspec.json.encode(command).decode()],
            env={**engine_environment(), "OMP_NUM_THREADS": "1", PARENT_PID_VARIABLE: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=inherited,
            start_new_session=True,  # a terminal's Ctrl-C is the service's to answer
        )
        _give_way(process.pid)
        return process

    def stop(self) -> None:
        """End it now. What it leaves is for the caller to remove, when `run` has returned."""
        with self._lock:
            self.is_stopped = True
            if self._process is not None:
                self._process.kill()  # does nothing once it was waited for


def _give_way(pid: int) -> None:
    """Let a process that has just begun, and its later threads, run and read when nobody else does."""
    os.setpriority(os.PRIO_PROCESS, pid, LOWEST_PRIORITY)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(number, _IOPRIO_OF_PROCESS, pid, _IOPRIO_IDLE)
