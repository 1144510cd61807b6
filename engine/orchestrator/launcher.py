"""Starts the rank processes of one machine under torchrun's contract, and ends them."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.protocol.environment import PARENT_PID_VARIABLE, STORE_FD_VARIABLE

RANK_COMMAND = (sys.executable, "-P", "-m", "engine.worker")
BUS_ERROR = (
    "memory behind which there is nothing any more; was a weights file cut that is mapped, does its disk fail, or is "
    "/dev/shm full? With --no-mmap weights need no file once they are loaded"
)


class RankProcesses:
    """The processes of one group. Ranks are killed, not asked: they hold nothing that must be saved."""

    def __init__(self, spec_path: Path, world_size: int, command: Sequence[str]) -> None:
        # The ranks' meeting point is bound here and handed to rank 0: nobody can take the port in between.
        with socket.create_server(("127.0.0.1", 0)) as store:
            self._processes = [
                subprocess.Popen(
                    [*command, str(spec_path)],
                    env=_environment(rank, world_size, store),
                    stdin=subprocess.DEVNULL,
                    pass_fds=(store.fileno(),) if rank == 0 else (),
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
    """Return "was killed by SIGKILL" or "exited with code 1"; of SIGBUS, which says little, what it comes from."""
    if code == -signal.SIGBUS:
        return f"was killed by SIGBUS: {BUS_ERROR}"
    if code < 0:
        known = -code in set(signal.Signals)
        return f"was killed by {signal.Signals(-code).name if known else f'signal {-code}'}"
    return f"exited with code {code}"


def _environment(rank: int, world_size: int, store: socket.socket) -> dict[str, str]:
    return {
        "GLOO_SOCKET_IFNAME": "lo",  # all ranks are on this machine; the host name need not resolve
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.getsockname()[1]),
        STORE_FD_VARIABLE: str(store.fileno()),
        PARENT_PID_VARIABLE: str(os.getpid()),
    }
