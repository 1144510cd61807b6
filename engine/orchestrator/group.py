"""The ranks of one epoch: launched, brought to READY, watched, killed."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq

from engine.orchestrator.handshake import Handshake
from engine.orchestrator.launcher import Ranks, StartRanks
from engine.orchestrator.loading import LoadingProgress
from engine.orchestrator.loss import GroupLostError, Loss, StartError, diagnose, killed_rank
from engine.orchestrator.watch import Watch
from engine.protocol.affinity import keep_process_on
from engine.protocol.beats import Beats
from engine.protocol.channel import Channel
from engine.protocol.config import RankSpec
from engine.protocol.messages import (
    Failed,
    GroupState,
    GroupStatus,
    Hello,
    Loading,
    Message,
    Ready,
    Recovery,
    Started,
)
from engine.worker.placement import asked_threads, read_processors, service_cpus

# When one rank fails the others fail soon after, and their words may arrive first: wait before naming the cause.
SETTLE_SECONDS = 0.2
SETTLE_POLL_SECONDS = 0.005


class Group:
    """Follows the ranks of one epoch, turn by turn, and says how it goes. Use it as a context manager.

    Args:
        spec: what to run, in the group's epoch.
        handshake: what the ranks must agree on.
        context: makes the sockets.
        beats: the file of this epoch.
        report: takes each status.
        recovery: how the group before was lost, if there was one; filled with this one's times.

    Raises: (`start` and `take_turn`)
        GroupLostError: when a rank is dead, hung, or fails after the start.
        StartError, HandshakeError, ProtocolError: when no group could do better.
        ValueError: when that is the user's to mend.
    """

    def __init__(
        self,
        spec: RankSpec,
        handshake: Handshake,
        context: "zmq.Context[zmq.Socket[bytes]]",
        beats: Beats,
        report: Callable[[GroupStatus], None],
        recovery: Recovery | None = None,
    ) -> None:
        self._spec = spec
        self._world_size = spec.engine.tensor_parallel_size
        self._handshake = handshake
        self._context = context
        self._beats = beats
        self._report = report
        self._recovery = recovery
        self._loading = LoadingProgress()
        self._controls: list[Channel] = []
        self._ranks: Ranks | None = None
        self._seconds: dict[str, float] = {}
        self.is_ready = False

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as failing:
            failing.callback(self._close_controls)  # one left open would keep this process from ending
            for rank in range(self._world_size):
                control = Channel(self._context, self._spec.epoch, Hello, Loading, Ready, Started, Failed)
                self._controls.append(control)
                control.bind(self._spec.control_endpoint(rank))
            failing.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill the ranks, and remove what is left of them."""
        if self._ranks is not None:
            self._ranks.kill()
        self._close_controls()
        epoch = self._spec.epoch
        remove_files(self._spec.run_dir, (f"control-{epoch}-*", f"engine-{epoch}", f"steps-{epoch}-*"))

    def _close_controls(self) -> None:
        for control in self._controls:
            control.close()

    @property
    def sockets(self) -> "list[zmq.Socket[bytes]]":
        """What to wait on for the next turn."""
        return [control.socket for control in self._controls]

    def start(self, start_ranks: StartRanks, spec_path: Path) -> None:
        """Start the ranks."""
        self._began = time.monotonic()
        self._report_coming()
        self._ranks = start_ranks(spec_path, self._world_size, epoch=self._spec.epoch)
        self._watch = Watch(self._beats, self._ranks, self._world_size, self._spec.engine.rank_timeout)

    # --- turns -------------------------------------------------------------------------------------------------------

    def seconds_until_due(self) -> float:
        """Return within how many seconds the next turn should be, whatever happens."""
        report = self._seconds_until_report()
        look = self._watch.seconds_until_due()
        return look if report is None else min(look, report)

    def take_turn(self) -> None:
        """Hear what the ranks say, look at them, and report what is new."""
        assert self._ranks is not None
        messages = list(self._take_messages())
        if self._ranks.dead() or _failures(messages):
            self._lose(self._diagnose(messages, self._ranks))
        for message in messages:
            self._hear(message)
        if self._watch.seconds_until_due() == 0 and (loss := self._watch.look()) is not None:
            self._lose(loss)
        if self._seconds_until_report() == 0:
            self._report_coming()
        if self.is_ready:
            self._ranks.prepare_next()

    def _take_messages(self) -> Iterator[Message]:
        for control in self._controls:
            while (message := control.receive(0)) is not None:
                yield message

    def _diagnose(self, messages: list[Message], ranks: Ranks) -> Loss:
        deadline = time.monotonic() + SETTLE_SECONDS
        while killed_rank(ranks) is None and time.monotonic() < deadline:
            time.sleep(SETTLE_POLL_SECONDS)
            messages += self._take_messages()
        loss = diagnose(messages, ranks)
        is_consequence = loss.kind == "failed" and not loss.is_user_error
        return (self._watch.stopped() if is_consequence else None) or loss

    def _lose(self, loss: Loss) -> None:
        if loss.is_user_error:
            raise ValueError(loss.cause)
        if loss.kind == "failed" and not self.is_ready:
            raise StartError(loss.cause)
        raise GroupLostError(loss)

    def _hear(self, message: Message) -> None:
        """Take one step of the handshake: the group starts when the last rank has loaded."""
        if isinstance(message, Hello):
            self._handshake.hear_hello(message)
            if self._handshake.all_said_hello:
                self._note_phase("respawn")
                self._report_coming()
        elif isinstance(message, Loading):
            self._loading.hear(message)
        elif isinstance(message, Ready):
            self._handshake.hear_ready(message)
            self._start_when_loaded()
        elif isinstance(message, Started):
            self._handshake.hear_started(message)
            self._report_when_started()

    def _start_when_loaded(self) -> None:
        if self._handshake.all_loaded:
            start = self._handshake.start()
            for control in self._controls:
                control.try_send(start)  # a rank that is gone by now is found dead in the next turn

    # --- reports -----------------------------------------------------------------------------------------------------

    def _note_phase(self, name: str) -> None:
        """Say that a phase ends now, the others having ended before."""
        self._seconds[name] = time.monotonic() - self._began - sum(self._seconds.values())

    def _seconds_until_report(self) -> float | None:
        """Return when the server should hear how far loading has come; None: it need not, or is past that."""
        return None if self._handshake.all_started else self._loading.seconds_until_due()

    def _report_coming(self) -> None:
        self._loading.note_report()
        self._report(
            GroupStatus(
                epoch=self._spec.epoch,
                state=GroupState.STARTING if self._recovery is None else GroupState.RECOVERING,
                ranks=self._handshake.ranks,
                loaded_bytes=self._loading.loaded_bytes,
                total_bytes=self._loading.total_bytes,
                recovery=self._recovery,
            )
        )

    def _report_when_started(self) -> None:
        if not self._handshake.all_started:
            return
        self._note_phase("load")
        self.is_ready = True
        start = self._handshake.start()
        self._report(
            GroupStatus(
                epoch=self._spec.epoch,
                state=GroupState.READY,
                ranks=self._handshake.ranks,
                engine_endpoint=self._spec.engine_endpoint,
                max_model_len=start.max_model_len,
                num_kv_blocks=start.num_kv_blocks,
                memory=self._handshake.memory(start.num_kv_blocks),
                service_cpus=self._leave_the_ranks_cores(),
                kernels=self._handshake.kernels,
                recovery=_with_seconds(self._recovery, self._seconds),
            )
        )

    def _leave_the_ranks_cores(self) -> list[int]:
        """Run, from now on, where no rank computes, if there is such a place; return it, for the server."""
        if any(rank.device != "cpu" for rank in self._handshake.ranks):
            return []
        cpus = service_cpus(read_processors(), self._world_size, asked_threads())
        keep_process_on(cpus)
        return list(cpus)


def remove_files(folder: str, patterns: Iterable[str]) -> None:
    """Remove the files of a folder whose names match, if it is there."""
    with contextlib.suppress(OSError):
        for pattern in patterns:
            for path in Path(folder).glob(pattern):
                path.unlink(missing_ok=True)


def _failures(messages: list[Message]) -> bool:
    return any(isinstance(message, Failed) for message in messages)


def _with_seconds(recovery: Recovery | None, seconds: Mapping[str, float]) -> Recovery | None:
    if recovery is None:
        return None
    return Recovery(
        cause=recovery.cause,
        noticed_at=recovery.noticed_at,
        in_step=recovery.in_step,
        seconds={**recovery.seconds, **seconds},
        kind=recovery.kind,
    )
