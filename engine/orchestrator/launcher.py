"""Starts the rank processes of one machine under torchrun's contract, and ends them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from engine.protocol.environment import EPOCH_VARIABLE, PARENT_PID_VARIABLE, STORE_FD_VARIABLE
from engine.worker.parent import adopt_orphans

RANK_COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "engine.worker")
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}  # NumPy's library starts its threads when it is loaded, before the fork
REPLACE_SECONDS = 30.0  # that a process which ranks are forked from must have lived to be replaced before it is needed
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

    def prepare_next(self) -> None:
        """Have ready what makes the start of the next group fast."""
        ...

    def kill(self) -> None:
        """Kill every rank and wait until all are gone."""
        ...


class StartRanks(Protocol):
    """Starts the ranks of an epoch, of what the file says."""

    def __call__(self, spec_path: Path, world_size: int, *, epoch: int) -> Ranks:
        """Return as many processes as `world_size`, which may not be there yet."""
        ...


class RankProcesses:
    """Ranks that are started by a command each, of `epoch`, or of the one that the file says."""

    def __init__(self, spec_path: Path, world_size: int, command: Sequence[str], *, epoch: int | None = None) -> None:
        # The ranks' meeting point is bound here and handed to rank 0: nobody can take the port in between.
        with socket.create_server(("127.0.0.1", 0)) as store:
            self._processes = [
                subprocess.Popen(
                    [*command, str(spec_path)],
                    env={**_environment(), **_environment_of_rank(rank, world_size, epoch, store)},
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

    def prepare_next(self) -> None:
        """See `Ranks`. Each is started by a command: there is nothing to prepare."""

    def kill(self) -> None:
        """See `Ranks`."""
        for process in self._processes:
            process.kill()  # does nothing to one that was reaped already
        for process in self._processes:
            process.wait()


class ForkServer:
    """A process that imports torch once, from which the ranks of each epoch are forked; see `engine.worker.fork`.

    It is started at once, before it is known what to run. If it ends, another takes its place; its ranks go on.
    """

    def __init__(self, command: Sequence[str]) -> None:
        adopt_orphans()
        self._command = command
        self._cpus = os.sched_getaffinity(0)
        self._start()

    def _start(self) -> None:
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.link.setblocking(False)
        with theirs:
            environment = {**_environment(), **ONE_THREAD}
            self.process = subprocess.Popen(self._command, env=environment, stdin=theirs.fileno())
        self._started_at = time.monotonic()
        with contextlib.suppress(OSError):  # it has ended, or what may be used has changed
            os.sched_setaffinity(self.process.pid, self._cpus)  # this process may be kept on fewer by now

    def start_ranks(self, spec_path: Path, world_size: int, *, epoch: int) -> "ForkedRanks":
        """Have `world_size` ranks forked, of what the file says, in `epoch`."""
        if self.process.poll() is not None:
            self._replace()
        with (
            socket.create_server(("127.0.0.1", 0)) as store,
            contextlib.suppress(BrokenPipeError, ConnectionResetError),  # it has ended, as will be noticed
        ):
            socket.send_fds(self.link, [os.fsencode(f"{epoch} {world_size} {spec_path}")], [store.fileno()])
        return ForkedRanks(self)

    def prepare(self) -> None:
        """Start another if it has ended, for ranks to come; not if it ends again and again."""
        if self.process.poll() is not None and time.monotonic() - self._started_at > REPLACE_SECONDS:
            self._replace()

    def _replace(self) -> None:
        self.link.close()
        self._start()

    def kill(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


class ForkedRanks:
    """Ranks of one epoch, forked by a `ForkServer`. They are this process's children; see `Ranks`."""

    def __init__(self, server: ForkServer) -> None:
        self._server = server
        self._pids: list[int] = []  # none until they are told
        self._codes: dict[int, int] = {}

    def dead(self) -> dict[int, int]:
        """See `Ranks`. Before any is forked, the process that they are forked from counts as rank 0."""
        code = self._server.process.poll()
        self._hear_of_forks()
        if not self._pids:
            return {} if code is None else {0: code}
        for rank, pid in enumerate(self._pids):
            self._reap(rank, pid, os.WNOHANG)
        self._reap_others()
        return dict(self._codes)

    def pid(self, rank: int) -> int:
        """See `Ranks`."""
        return self._pids[rank] if self._pids else self._server.process.pid

    def prepare_next(self) -> None:
        """See `Ranks`."""
        self._server.prepare()

    def kill(self) -> None:
        """See `Ranks`. Ranks that are being forked end when the process that forks them does."""
        self._hear_of_forks()
        if not self._pids:
            self._server.kill()
            self._hear_of_forks()
        for rank, pid in enumerate(self._pids):
            if rank not in self._codes:
                os.kill(pid, signal.SIGKILL)
        for rank, pid in enumerate(self._pids):
            self._reap(rank, pid, 0)

    def _hear_of_forks(self) -> None:
        if not self._pids:
            with contextlib.suppress(BlockingIOError, ConnectionResetError):
                self._pids = [int(pid) for pid in self._server.link.recv(65536).split()]

    def _reap(self, rank: int, pid: int, options: int) -> None:
        if rank not in self._codes:
            ended, status = os.waitpid(pid, options)
            if ended:
                self._codes[rank] = os.waitstatus_to_exitcode(status)

    def _reap_others(self) -> None:
        """Reap what was adopted of a process that ended while it forked."""
        known = {self._server.process.pid, *self._pids}
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in known:
                os.waitpid(ended.si_pid, 0)


def describe_exit(code: int) -> str:
    """Return "was killed by SIGKILL" or "exited with code 1"; of SIGBUS, which says little, what it comes from."""
    if code == -signal.SIGBUS:
        return f"was killed by SIGBUS: {BUS_ERROR}"
    if code < 0:
        known = -code in set(signal.Signals)
        return f"was killed by {signal.Signals(-code).name if known else f'signal {-code}'}"
    return f"exited with code {code}"


def _environment() -> dict[str, str]:
    """Return what is the same for all ranks."""
    return {
        "GLOO_SOCKET_IFNAME": "lo",  # all ranks are on this machine; the host name need not resolve
        # torch asks for the name of each address that it connects to, ::ffff:127.0.0.1 here, which only DNS may know:
        # where an answer is lost, a start waits for one second, not five.
        "RES_OPTIONS": "timeout:1",
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        PARENT_PID_VARIABLE: str(os.getpid()),
    }


def _environment_of_rank(rank: int, world_size: int, epoch: int | None, store: socket.socket) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_PORT": str(store.getsockname()[1]),
        STORE_FD_VARIABLE: str(store.fileno()),
        **({} if epoch is None else {EPOCH_VARIABLE: str(epoch)}),
    }
