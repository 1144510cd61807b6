"""Starts the rank processes of one machine under torchrun's contract, and ends them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

from engine.protocol.environment import PARENT_PID_VARIABLE, STORE_FD_VARIABLE
from engine.worker.parent import adopt_orphans

RANK_COMMAND = (sys.executable, "-P", "-m", "engine.worker")
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}  # NumPy's library starts its threads when it is loaded, before the fork
BUS_ERROR = (
    "memory behind which there is nothing any more; was a weights file cut that is mapped, does its disk fail, or is "
    "/dev/shm full? With --no-mmap weights need no file once they are loaded"
)


class Ranks(Protocol):
    """The processes of one group. Ranks are killed, not asked: they hold nothing that must be saved."""

    def dead(self) -> dict[int, int]:
        """Return the exit codes of the ranks that have ended, by rank; negative is a signal's number."""
        ...

    def pid(self, rank: int) -> int:
        """Return a rank's process id."""
        ...

    def kill(self) -> None:
        """Kill every rank and wait until all are gone."""
        ...


class RankProcesses:
    """Ranks that are started by a command each."""

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
        """See `Ranks`."""
        codes = {rank: process.poll() for rank, process in enumerate(self._processes)}
        return {rank: code for rank, code in codes.items() if code is not None}

    def pid(self, rank: int) -> int:
        """See `Ranks`."""
        return self._processes[rank].pid

    def kill(self) -> None:
        """See `Ranks`."""
        for process in self._processes:
            process.kill()  # does nothing to one that was reaped already
        for process in self._processes:
            process.wait()


class ForkedRanks:
    """Ranks that import torch once: the first is started before it is known what to run, and forks the others.

    Those are this process's children too; see `engine.worker.fork`.
    """

    def __init__(self, command: Sequence[str] = RANK_COMMAND) -> None:
        adopt_orphans()
        self._link, theirs = socket.socketpair()
        with theirs, socket.create_server(("127.0.0.1", 0)) as store:
            environment = {**_environment(0, 1, store), **ONE_THREAD}
            self._first = subprocess.Popen(command, env=environment, stdin=theirs.fileno(), pass_fds=(store.fileno(),))
        self._link.setblocking(False)
        self._forked: list[int] = []  # process ids of ranks 1, 2, …, once they are known
        self._codes: dict[int, int] = {}

    def start(self, spec_path: Path, world_size: int) -> Self:
        """Have them be `world_size` ranks of what the file says."""
        with contextlib.suppress(BrokenPipeError):  # the first has ended, as will be noticed
            self._link.send(os.fsencode(f"{world_size} {spec_path}"))
        return self

    def dead(self) -> dict[int, int]:
        """See `Ranks`."""
        self._hear_of_forks()
        code = self._first.poll()
        if code is not None:
            self._codes[0] = code
        for rank, pid in enumerate(self._forked, start=1):
            self._reap(rank, pid, os.WNOHANG)
        return dict(self._codes)

    def pid(self, rank: int) -> int:
        """See `Ranks`."""
        return self._first.pid if rank == 0 else self._forked[rank - 1]

    def kill(self) -> None:
        """See `Ranks`. A rank that was being forked dies with this process."""
        self._first.kill()
        self._first.wait()
        self._hear_of_forks()
        for rank, pid in enumerate(self._forked, start=1):
            if rank not in self._codes:
                os.kill(pid, signal.SIGKILL)
                self._reap(rank, pid, 0)

    def _hear_of_forks(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            if told := self._link.recv(65536):
                self._forked = [int(pid) for pid in told.split()]

    def _reap(self, rank: int, pid: int, options: int) -> None:
        if rank not in self._codes:
            ended, status = os.waitpid(pid, options)
            if ended:
                self._codes[rank] = os.waitstatus_to_exitcode(status)


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
        # torch asks for the name of each address that it connects to, ::ffff:127.0.0.1 here, which only DNS may know:
        # where an answer is lost, a start waits for one second, not five.
        "RES_OPTIONS": "timeout:1",
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
