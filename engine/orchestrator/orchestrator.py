"""Runs one rank group: launch, handshake, watch, end."""

import contextlib
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from engine.orchestrator.handshake import Handshake, HandshakeError
from engine.orchestrator.launcher import Ranks, describe_exit
from engine.orchestrator.loading import LoadingProgress
from engine.protocol.affinity import keep_process_on
from engine.protocol.channel import Channel
from engine.protocol.codec import ProtocolError
from engine.protocol.config import RUN_DIR_FILES, RankSpec
from engine.protocol.messages import Failed, GroupState, GroupStatus, Hello, Loading, Message, Ready, Started
from engine.protocol.model_config import ModelConfig
from engine.worker.placement import asked_threads, read_processors, service_cpus

# When one rank dies the others fail soon after, and their words may arrive first: wait before naming the cause.
SETTLE_SECONDS = 0.2
# How long the last status waits for the server to hear it. One that has just started may not listen yet.
LINGER_MS, LINGER_OF_A_FAILURE_MS = 1000, 10_000


class MultiGPUOrchestrator:
    """Launches the ranks, checks that they agree, tells the server of each change, and ends them all together.

    It ends when SIGTERM comes or standard input closes: the server holds the other end, so the group never outlives it.

    Args:
        spec: what to run.
        spec_path: the file that holds it, for the ranks.
        start_ranks: starts as many ranks as it is told, of what the file at a path says.
    """

    def __init__(self, spec: RankSpec, *, spec_path: Path, start_ranks: Callable[[Path, int], Ranks]) -> None:
        self._spec = spec
        self._spec_path = spec_path
        self._start_ranks = start_ranks
        self._world_size = spec.engine.tensor_parallel_size
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._status = Channel(self._context, None)
        self._status.socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._controls = [
            Channel(self._context, spec.epoch, Hello, Loading, Ready, Started, Failed) for _ in range(self._world_size)
        ]
        self._poller = zmq.Poller()
        self._loading = LoadingProgress()

    def run(self) -> int:
        """Run the group to its end and return the exit code: 0 when asked to stop, 1 when it failed."""
        self._status.connect(self._spec.status_endpoint)
        wakeup = _signals_to_socket()
        self._poller.register(wakeup, zmq.POLLIN)
        self._poller.register(sys.stdin.fileno(), zmq.POLLIN)
        for rank, control in enumerate(self._controls):
            control.bind(self._spec.control_endpoint(rank))
            self._poller.register(control.socket, zmq.POLLIN)
        ranks: Ranks | None = None
        try:
            config = ModelConfig.from_directory(self._spec.engine.model)
            config.check_tensor_parallel_size(self._world_size)
            config.check_max_model_len(self._spec.engine.max_model_len)
            ranks = self._start_ranks(self._spec_path, self._world_size)
            return self._run_group(ranks, Handshake(self._spec.engine, config, self._spec.epoch), wakeup)
        except ValueError as error:
            return self._fail(str(error), True)
        except (HandshakeError, ProtocolError) as error:
            return self._fail(str(error), False)
        finally:
            if ranks is not None:
                ranks.kill()
            self._close()

    def _run_group(self, ranks: Ranks, handshake: Handshake, wakeup: socket.socket) -> int:
        self._report_starting(handshake)
        while not self._is_asked_to_stop(wakeup, self._seconds_until_report(handshake)):
            messages = self._take_messages()
            if ranks.dead() or any(isinstance(message, Failed) for message in messages):
                time.sleep(SETTLE_SECONDS)
                return self._fail(*diagnose(messages + self._take_messages(), ranks))
            for message in messages:
                self._hear(message, handshake)
            if self._seconds_until_report(handshake) == 0:
                self._report_starting(handshake)
        return 0

    # --- events ------------------------------------------------------------------------------------------------------

    def _is_asked_to_stop(self, wakeup: socket.socket, timeout: float | None) -> bool:
        """Sleep until something happens, or for `timeout` seconds; return whether it is SIGTERM or the end of input."""
        ready = dict(self._poller.poll(None if timeout is None else math.ceil(timeout * 1000)))
        if wakeup.fileno() in ready and signal.SIGTERM in wakeup.recv(4096):
            return True
        if sys.stdin.fileno() in ready and not os.read(sys.stdin.fileno(), 4096):
            self._remove_run_dir()
            return True
        return False

    def _take_messages(self) -> list[Message]:
        messages = []
        for control in self._controls:
            while (message := control.receive(0)) is not None:
                messages.append(message)
        return messages

    def _hear(self, message: Message, handshake: Handshake) -> None:
        """Take one step of the handshake: the group starts when the last rank has loaded."""
        if isinstance(message, Hello):
            handshake.hear_hello(message)
            if handshake.all_said_hello:
                self._report_starting(handshake)
        elif isinstance(message, Loading):
            self._loading.hear(message)
        elif isinstance(message, Ready):
            handshake.hear_ready(message)
            self._start_when_loaded(handshake)
        elif isinstance(message, Started):
            handshake.hear_started(message)
            self._report_when_started(handshake)

    def _seconds_until_report(self, handshake: Handshake) -> float | None:
        """Return when the server should hear how far loading has come; None: it need not, or is past that."""
        return None if handshake.all_started else self._loading.seconds_until_due()

    def _report_starting(self, handshake: Handshake) -> None:
        self._loading.note_report()
        self._status.send(
            GroupStatus(
                epoch=self._spec.epoch,
                state=GroupState.STARTING,
                ranks=handshake.ranks,
                loaded_bytes=self._loading.loaded_bytes,
                total_bytes=self._loading.total_bytes,
            )
        )

    def _start_when_loaded(self, handshake: Handshake) -> None:
        if handshake.all_loaded:
            start = handshake.start()
            for control in self._controls:
                control.try_send(start)  # a rank that is gone by now is found dead in the next turn

    def _report_when_started(self, handshake: Handshake) -> None:
        if not handshake.all_started:
            return
        start = handshake.start()
        cpus = self._leave_the_ranks_cores(handshake)
        self._status.send(
            GroupStatus(
                epoch=self._spec.epoch,
                state=GroupState.READY,
                ranks=handshake.ranks,
                engine_endpoint=self._spec.engine_endpoint,
                max_model_len=start.max_model_len,
                num_kv_blocks=start.num_kv_blocks,
                memory=handshake.memory(start.num_kv_blocks),
                service_cpus=cpus,
                kernels=handshake.kernels,
            )
        )

    def _leave_the_ranks_cores(self, handshake: Handshake) -> list[int]:
        """Run, from now on, where no rank computes, if there is such a place; return it, for the server."""
        if any(rank.device != "cpu" for rank in handshake.ranks):
            return []
        cpus = service_cpus(read_processors(), self._world_size, asked_threads())
        keep_process_on(cpus)
        return list(cpus)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _fail(self, error: str, is_user_error: bool) -> int:
        self._status.socket.setsockopt(zmq.LINGER, LINGER_OF_A_FAILURE_MS)
        self._status.send(
            GroupStatus(epoch=self._spec.epoch, state=GroupState.FAILED, error=error, is_user_error=is_user_error)
        )
        return 1

    def _remove_run_dir(self) -> None:
        """Remove what this service put there: the server that made the folder is gone, or is removing it itself."""
        run_dir = Path(self._spec.run_dir)
        with contextlib.suppress(OSError):
            for pattern in RUN_DIR_FILES:
                for path in run_dir.glob(pattern):
                    path.unlink(missing_ok=True)
            run_dir.rmdir()

    def _close(self) -> None:
        for control in self._controls:
            control.close()
        self._status.socket.close()
        self._context.term()


def diagnose(messages: list[Message], ranks: Ranks) -> tuple[str, bool]:
    """Return the likeliest first cause of a group's end, and whether it is the user's to mend.

    A mistake of the user explains everything; a rank that a signal ended explains why the others lost a peer.
    """
    failures = [message for message in messages if isinstance(message, Failed)]
    for failed in failures:
        if failed.is_user_error:
            return failed.error, True
    dead = ranks.dead()
    killed = [rank for rank, code in dead.items() if code < 0]
    if failures and not killed:
        return f"rank {failures[0].rank} failed: {failures[0].error}", False
    rank = (killed or list(dead))[0]
    return f"rank {rank} (pid {ranks.pid(rank)}) {describe_exit(dead[rank])}", False


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
