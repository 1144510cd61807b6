"""Follows the rank group's life as the orchestrator tells it, and replaces the orchestrator when that is gone."""

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial

import zmq.asyncio
from msgspec.structs import replace

from engine.protocol.channel import StatusChannel
from engine.protocol.codec import ProtocolError
from engine.protocol.messages import GroupState, GroupStatus, Recovery
from server.engine_client import EngineClient
from server.launch import EngineProcess
from server.threads import in_daemon_thread

logger = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 0.5  # how long a status sent just before the exit may take to arrive
MAX_VAIN_RESTARTS = 3  # in a row
LONGEST_PERIOD, LOOKS = 1.0, 8  # from one look at the orchestrator to the next; within --rank-timeout, at least
STEADY_SECONDS = 60.0  # a group that was READY for so long was not started in vain


class Supervisor:
    """Keeps the client's view of the group up to date.

    Args:
        context: makes the status channel's socket.
        process: the orchestrator.
        client: is connected when the group is READY, and told when it is lost.
        on_status: is called with each status.
        on_ready: is called after that, with the first one that says READY.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        process: EngineProcess,
        client: EngineClient,
        on_status: Callable[[GroupStatus], None],
        on_ready: Callable[[GroupStatus], None],
    ) -> None:
        self._process = process
        self._client = client
        self._on_status = on_status
        self._on_ready = on_ready
        self._channel = StatusChannel(context, process.spec.status_endpoint)
        self._epoch = process.spec.epoch  # what a status says of an earlier one comes too late
        self._lost_epoch = 0  # the last epoch whose group was lost
        self._ready_since: float | None = None  # by `time.monotonic`
        self._num_vain_restarts = 0
        self._restart: _Restart | None = None  # of the orchestrator, until the group is READY

    async def run(self) -> GroupStatus:
        """Follow the group until it fails for good; return its last status, which says why."""
        try:
            while True:
                end = await self._follow_orchestrator()
                failed = await self._recover(end) if isinstance(end, Recovery) else end
                if failed is not None:
                    return failed
        finally:
            self._channel.close()

    async def _follow_orchestrator(self) -> GroupStatus | Recovery:
        """Return the group's last status, or how the orchestrator, or the way to its group, was lost."""
        following = asyncio.ensure_future(self._follow())
        broken = asyncio.ensure_future(self._client.until_broken())
        exited = asyncio.ensure_future(in_daemon_thread(self._process.wait))
        suspended = asyncio.ensure_future(self._until_suspended())
        try:
            await asyncio.wait((following, broken, exited, suspended), return_when=asyncio.FIRST_COMPLETED)
            noticed_at = time.time()
            if exited.done() and exited.result() >= 0:
                await asyncio.wait((following,), timeout=LAST_WORDS_SECONDS)
            if following.done():
                return following.result()
            if broken.done():
                return Recovery(broken.result(), noticed_at, kind="link")
            if not exited.done():
                return Recovery(suspended.result(), noticed_at, kind="orchestrator")
            cause = _describe_exit(exited.result())
            if exited.result() >= 0 and not self._client.was_ready:  # it would end in the same way again
                return self._fail(cause)
            return Recovery(cause, noticed_at, kind="orchestrator")
        finally:
            for task in (following, broken, exited, suspended):
                task.cancel()
            await asyncio.gather(following, broken, exited, suspended, return_exceptions=True)

    async def _until_suspended(self) -> str:
        """Wait until the orchestrator was stopped for as long as no rank may be; return that.

        Only time in which this process itself looked counts, as with ranks.
        """
        timeout = self._process.spec.engine.rank_timeout
        period, seconds = min(LONGEST_PERIOD, timeout / LOOKS), 0.0
        while seconds <= timeout:
            await asyncio.sleep(period)
            seconds = seconds + period if self._process.is_suspended else 0.0
        return f"the engine's orchestrator was stopped, and not continued within {timeout:g} s"

    async def _follow(self) -> GroupStatus:
        """Take statuses until one is FAILED."""
        while True:
            try:
                status = await self._channel.receive()
            except ProtocolError as error:
                return self._fail(f"the orchestrator does not make sense: {error}")
            assert isinstance(status, GroupStatus)
            if status.epoch >= self._epoch:
                status = self._hear(status if self._restart is None else self._restart.complete(status))
                if status.state is GroupState.FAILED:
                    return status

    def _hear(self, status: GroupStatus) -> GroupStatus:
        """Take over a status; return it, or the FAILED one that comes of it."""
        self._on_status(status)
        self._epoch = status.epoch
        if status.state is GroupState.READY:
            self._take_group(status)
        elif status.recovery is not None and self._lost_epoch < status.epoch - 1:
            return self._lose_group(status, status.recovery)
        else:
            self._client.set_status(status)
        return status

    def _take_group(self, status: GroupStatus) -> None:
        is_first = not self._client.was_ready
        self._ready_since, self._restart = time.monotonic(), None
        self._client.connect(status)
        if is_first:
            self._on_ready(status)
        elif status.recovery is not None:
            logger.warning("epoch %d is ready: %s", status.epoch, _describe_seconds(status.recovery.seconds))

    def _lose_group(self, status: GroupStatus, recovery: Recovery) -> GroupStatus:
        """Have the requests wait for the next group, unless too many were started in vain."""
        self._lost_epoch = status.epoch - 1
        logger.warning("epoch %d is lost, the next is being started: %s", self._lost_epoch, recovery.cause)
        was_steady = self._ready_since is not None and time.monotonic() - self._ready_since >= STEADY_SECONDS
        self._ready_since = None
        has_progressed = self._client.lose(status)
        self._num_vain_restarts = 0 if has_progressed or was_steady else self._num_vain_restarts + 1
        if self._num_vain_restarts > MAX_VAIN_RESTARTS:
            count = self._num_vain_restarts
            return self._fail(f"{recovery.cause}; {count} restarts in a row came to nothing")
        return status

    async def _recover(self, recovery: Recovery) -> GroupStatus | None:
        """Start the next epoch under another orchestrator; return the last status if that cannot be."""
        client, epoch = self._client, self._epoch + 1
        self._restart = restart = _Restart(recovery, is_recovery=client.was_ready)
        state = GroupState.RECOVERING if client.was_ready else GroupState.STARTING
        status = self._hear(GroupStatus(epoch=epoch, state=state, recovery=recovery))
        if status.state is GroupState.FAILED:
            return status
        sizes = client.status.num_kv_blocks or None, client.status.max_model_len or None
        try:
            await in_daemon_thread(partial(self._process.restart, epoch, *sizes))
            self._channel.listen_again()
        except OSError as error:
            return self._fail(f"{recovery.cause}; another cannot be started: {error.strerror}")
        restart.note("kill")
        return None

    def _fail(self, error: str) -> GroupStatus:
        status = GroupStatus(epoch=self._epoch, state=GroupState.FAILED, error=error)
        self._client.set_status(status)
        return status


class _Restart:
    """What statuses of a new orchestrator, which knows of no epoch before its own, do not say."""

    def __init__(self, recovery: Recovery, *, is_recovery: bool) -> None:
        self._recovery = recovery
        self._is_recovery = is_recovery
        self._last = time.monotonic()

    def note(self, phase: str) -> None:
        """Say that a phase is over."""
        now = time.monotonic()
        seconds = {**self._recovery.seconds, phase: now - self._last}
        self._recovery, self._last = replace(self._recovery, seconds=seconds), now

    def complete(self, status: GroupStatus) -> GroupStatus:
        """Return `status` with what is known here."""
        if status.recovery is not None:  # its own ranks were lost meanwhile
            return status
        if status.ranks and "respawn" not in self._recovery.seconds:
            self.note("respawn")
        if status.state is GroupState.READY:
            self.note("load")
            return replace(status, recovery=self._recovery)
        if status.state is GroupState.STARTING and self._is_recovery:
            return replace(status, state=GroupState.RECOVERING, recovery=self._recovery)
        return status


def _describe_exit(code: int) -> str:
    how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
    return f"the engine's orchestrator {how}"


def _describe_seconds(seconds: dict[str, float]) -> str:
    return ", ".join(f"{phase} {value:.2f} s" for phase, value in seconds.items())
