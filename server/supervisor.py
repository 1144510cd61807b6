"""Follows the rank group's life as the orchestrator tells it, and notices when the orchestrator itself is gone."""

import asyncio
from collections.abc import Callable

import zmq.asyncio

from engine.protocol.channel import StatusChannel
from engine.protocol.codec import ProtocolError
from engine.protocol.messages import GroupState, GroupStatus
from server.engine_client import EngineClient
from server.launch import EngineProcess
from server.threads import in_daemon_thread

LAST_WORDS_SECONDS = 0.5  # how long a status sent just before the exit may take to arrive


class Supervisor:
    """Keeps the client's view of the group up to date.

    Args:
        context: makes the status channel's socket.
        process: the orchestrator.
        client: is connected when the group is READY.
        on_status: is called with each status.
        on_ready: is called after that, with the one that says READY.
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

    async def run(self) -> GroupStatus:
        """Follow the group until it fails; return its last status, which says why."""
        following = asyncio.ensure_future(self._follow())
        broken = asyncio.ensure_future(self._client.until_broken())
        exited = asyncio.ensure_future(in_daemon_thread(self._process.wait))
        try:
            await asyncio.wait((following, broken, exited), return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                await asyncio.wait((following,), timeout=LAST_WORDS_SECONDS)
            if following.done():
                return following.result()
            return self._fail(broken.result() if broken.done() else _describe_exit(exited.result()))
        finally:
            for task in (following, broken, exited):
                task.cancel()
            await asyncio.gather(following, broken, exited, return_exceptions=True)
            self._channel.close()

    async def _follow(self) -> GroupStatus:
        """Take statuses until one is FAILED."""
        while True:
            try:
                status = await self._channel.receive()
            except ProtocolError as error:
                return self._fail(f"the orchestrator does not make sense: {error}")
            assert isinstance(status, GroupStatus)
            self._on_status(status)
            if status.state is GroupState.READY:
                self._client.connect(status)
                self._on_ready(status)
            else:
                self._client.set_status(status)
            if status.state is GroupState.FAILED:
                return status

    def _fail(self, error: str) -> GroupStatus:
        status = GroupStatus(epoch=self._client.status.epoch, state=GroupState.FAILED, error=error)
        self._client.set_status(status)
        return status


def _describe_exit(code: int) -> str:
    how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
    return f"the engine's orchestrator {how}"
