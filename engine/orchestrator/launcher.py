"""Starts the rank processes of one machine under torchrun's contract, and ends them."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from engine.worker.parent import PARENT_PID_VARIABLE


class RankProcesses:
    """The processes of one group. Ranks are killed, not asked: they hold nothing that must be saved."""

    def __init__(self, spec_path: Path, world_size: int) -> None:
        port = _free_port()
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-P", "-m", "engine.worker", str(spec_path)],
                env=_environment(rank, world_size, port),
                stdin=subprocess.DEVNULL,
            )
            for rank in range(world_size)
        ]

    def dead(self) -> dict[int, int]:
        """Return the exit codes of the ranks that have ended, by rank; negative is a signal's number."""
        codes = {rank: process.poll() for rank, process in enumerate(self._processes)}
        return {rank: code for rank, code in codes.items() if code is not None}

    def pid(self, rank: int) -> int:
        """Return a rank's process id."""
        return self._processes[rank].pid

    def kill(self) -> None:
        """Kill every rank and wait until all are gone."""
        for process in self._processes:
            process.kill()  # does nothing to one that was reaped already
        for process in self._processes:
            process.wait()


def describe_exit(code: int) -> str:
    """Return "was killed by SIGKILL" or "exited with code 1"."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with code {code}"


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "GLOO_SOCKET_IFNAME": "lo",  # all ranks are on this machine; the host name need not resolve
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        PARENT_PID_VARIABLE: str(os.getpid()),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
