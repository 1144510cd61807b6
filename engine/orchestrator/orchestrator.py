"""Runs rank groups, one after the other: where one is lost, the next takes its place."""

import contextlib
import math
import os
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import zmq

from engine.orchestrator.group import Group, remove_files
from engine.orchestrator.handshake import Agreement, Handshake, HandshakeError
from engine.orchestrator.launcher import StartRanks
from engine.orchestrator.loss import GroupLostError, StartError
from engine.protocol.affinity import keep_process_on
from engine.protocol.beats import Beats
from engine.protocol.channel import Channel
from engine.protocol.codec import ProtocolError
from engine.protocol.config import EPOCH_FILES, RUN_DIR_FILES, RankSpec
from engine.protocol.messages import GroupState, GroupStatus, Recovery
from engine.protocol.model_config import ModelConfig

MOST_LOST_STARTS = 3  # in a row: then the next is not expected to be better
# How long the last status waits for the server to hear it. One that has just started may not listen yet.
LINGER_MS, LINGER_OF_A_FAILURE_MS = 1000, 10_000


class MultiGPUOrchestrator:
    """Launches the ranks, tells the server of each change, ends them all together, and starts the next in their place.

    It ends when SIGTERM comes or standard input closes: the server holds the other end, so no group ever outlives it.

    Args:
        spec: what to run.
        spec_path: the file that holds it, for the ranks.
        start_ranks: starts the ranks of each epoch.
    """

    def __init__(self, spec: RankSpec, *, spec_path: Path, start_ranks: StartRanks) -> None:
        self._spec = spec
        self._spec_path = spec_path
        self._start_ranks = start_ranks
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._status = Channel(self._context, None)
        self._status.socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._poller = zmq.Poller()
        self._cpus = os.sched_getaffinity(0)
        self._agreement = Agreement.of(spec)  # what was agreed on before, and holds for all groups to come
        self._lost_starts = 0

    def run(self) -> int:
        """Run groups to the end and return the exit code: 0 when asked to stop, 1 when they failed."""
        self._status.connect(self._spec.status_endpoint)
        self._wakeup = _signals_to_socket()
        self._poller.register(self._wakeup, zmq.POLLIN)
        self._poller.register(sys.stdin.fileno(), zmq.POLLIN)
        try:
            config = ModelConfig.from_directory(self._spec.engine.model)
            config.check_tensor_parallel_size(self._spec.engine.tensor_parallel_size)
            config.check_max_model_len(self._spec.engine.max_model_len)
            self._run_groups(config)
            return 0
        except ValueError as error:
            return self._fail(str(error), True)
        except (StartError, HandshakeError, ProtocolError) as error:
            return self._fail(str(error), False)
        finally:
            self._close()

    # --- groups ------------------------------------------------------------------------------------------------------

    def _run_groups(self, config: ModelConfig) -> None:
        """Run one group after the other until asked to stop."""
        remove_files(self._spec.run_dir, EPOCH_FILES)  # of an orchestrator before this one
        with contextlib.closing(_make_beats(self._spec)) as beats:
            recovery: Recovery | None = None
            while True:
                handshake = Handshake(self._spec.engine, config, self._spec.epoch, self._agreement)
                group = Group(self._spec, handshake, self._context, beats, self._status.send, recovery)
                try:
                    with group:
                        self._follow(group)
                        return
                except GroupLostError as lost:
                    self._count(lost, group)
                    recovery = _recovery(lost, beats)
                self._agreement = handshake.agreement or self._agreement
                self._spec = replace(self._spec, epoch=self._spec.epoch + 1)
                with _errors_of(self._spec.beats_path):
                    beats.pass_on(self._spec.beats_path)

    def _follow(self, group: Group) -> None:
        """Let a group run until asked to stop."""
        keep_process_on(self._cpus)  # the ranks are to find all cores
        if not self._spec_path.exists():  # what cleans /tmp up has been there
            with _errors_of(self._spec_path):
                self._spec_path.write_bytes(msgspec.json.encode(self._spec))
        group.start(self._start_ranks, self._spec_path)
        for control in group.sockets:
            self._poller.register(control, zmq.POLLIN)
        try:
            while not self._is_asked_to_stop(group.seconds_until_due()):
                group.take_turn()
        finally:
            for control in group.sockets:
                self._poller.unregister(control)

    def _count(self, lost: GroupLostError, group: Group) -> None:
        """Take note of a loss.

        Raises:
            StartError: if it is one too many.
        """
        self._lost_starts = 0 if group.is_ready else self._lost_starts + 1
        if self._lost_starts == MOST_LOST_STARTS:
            raise StartError(f"{lost}; that was start {MOST_LOST_STARTS} in a row which ended so") from lost

    # --- events ------------------------------------------------------------------------------------------------------

    def _is_asked_to_stop(self, timeout: float) -> bool:
        """Sleep until something happens, or for `timeout` seconds; return whether it is SIGTERM or the end of input."""
        ready = dict(self._poller.poll(math.ceil(timeout * 1000)))
        if self._wakeup.fileno() in ready and signal.SIGTERM in self._wakeup.recv(4096):
            return True
        if sys.stdin.fileno() in ready and not os.read(sys.stdin.fileno(), 4096):
            self._remove_run_dir()
            return True
        return False

    # --- the end -----------------------------------------------------------------------------------------------------

    def _fail(self, error: str, is_user_error: bool) -> int:
        self._status.socket.setsockopt(zmq.LINGER, LINGER_OF_A_FAILURE_MS)
        self._status.send(
            GroupStatus(epoch=self._spec.epoch, state=GroupState.FAILED, error=error, is_user_error=is_user_error)
        )
        return 1

    def _remove_run_dir(self) -> None:
        """Remove what this service put there: the server that made the folder is gone, or is removing it itself."""
        remove_files(self._spec.run_dir, RUN_DIR_FILES)
        with contextlib.suppress(OSError):
            Path(self._spec.run_dir).rmdir()

    def _close(self) -> None:
        signal.set_wakeup_fd(-1)
        self._status.socket.close()
        self._context.term()


def _make_beats(spec: RankSpec) -> Beats:
    with _errors_of(spec.beats_path):
        return Beats(spec.beats_path, spec.engine.tensor_parallel_size)


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Say of a file in the folder of sockets that it cannot be made: the folder may be gone, or its disk full."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"TMPDIR: {path} cannot be made: {error.strerror}") from error


def _recovery(lost: GroupLostError, beats: Beats) -> Recovery:
    """Return what is known of a loss when the group's processes are gone."""
    return Recovery(
        cause=lost.loss.cause,
        noticed_at=lost.noticed_at,
        in_step=beats.step(),
        seconds={"kill": lost.seconds_ago()},
        kind=lost.loss.kind,
    )


def _signals_to_socket() -> socket.socket:
    """Return a socket on which SIGTERM and SIGCHLD can be polled for, as bytes with their numbers."""
    receiver, sender = socket.socketpair()
    receiver.setblocking(False)
    sender.setblocking(False)
    sender.send(bytes([signal.SIGCHLD]))  # a rank that was started before may have ended before
    signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)  # the wake-up is what matters
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return receiver
