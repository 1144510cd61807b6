"""Links between two processes: ZeroMQ sockets that carry messages of one epoch.

Both ends are DEALER sockets without a high-water mark (flow is bounded by what is in flight, never by dropping) and
without lingering (what a dead group left unsent must not reach its successor).
"""

import contextlib
import math
from pathlib import Path

import zmq
import zmq.asyncio

from engine.protocol.codec import Decoder, encode
from engine.protocol.messages import GroupStatus, Message, StatsReport, TokenBatch

# Until an end that connected before the other listened tries again. ZeroMQ's own 100 would be part of most starts.
RECONNECT_MILLISECONDS = 5


def _configure(socket: "zmq.Socket[bytes] | zmq.asyncio.Socket") -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MILLISECONDS)


def _bind(socket: "zmq.Socket[bytes] | zmq.asyncio.Socket", endpoint: str) -> str:
    socket.bind(endpoint)
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


class Channel:
    """One end of a two-way link, for a process that waits.

    `epoch=None` takes messages of any epoch (only the server's end of the status channel outlives epochs).
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", epoch: int | None, *receives: type[Message]) -> None:
        self.socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        _configure(self.socket)
        self._epoch = epoch
        self._decoder = Decoder(*receives) if receives else None

    def bind(self, endpoint: str) -> str:
        """Listen; return the endpoint that the other side connects to (`tcp://host:*` picks a port)."""
        return _bind(self.socket, endpoint)

    def connect(self, endpoint: str) -> None:
        """Connect to where the other side listens, or will listen."""
        self.socket.connect(endpoint)

    def send(self, message: Message) -> None:
        """Queue `message` for the other side. The end that bound waits here until the other has first connected."""
        self.socket.send(encode(message))

    def try_send(self, message: Message) -> None:
        """Queue `message` if there is an other side; drop it where there is none, or none any more."""
        with contextlib.suppress(zmq.Again):
            self.socket.send(encode(message), zmq.DONTWAIT)

    def receive(self, timeout: float | None = None) -> Message | None:
        """Wait up to `timeout` seconds (None: for ever) and return the next message, or None if none came."""
        if self._decoder is None:
            raise RuntimeError("this end only sends")
        while True:
            if not self.socket.poll(None if timeout is None else math.ceil(timeout * 1000)):
                return None
            message = self._decoder.decode(self.socket.recv())
            if self._epoch is None or message.epoch == self._epoch:
                return message

    def close(self) -> None:
        """Close at once; what was not sent yet is dropped."""
        self.socket.close(linger=0)


class AsyncChannel:
    """One end of a two-way link, for an asyncio process. See `Channel`."""

    def __init__(self, context: zmq.asyncio.Context, epoch: int | None, *receives: type[Message]) -> None:
        self._socket: zmq.asyncio.Socket = context.socket(zmq.DEALER)
        _configure(self._socket)
        self._epoch = epoch
        self._decoder = Decoder(*receives)

    def bind(self, endpoint: str) -> str:
        """Listen; return the endpoint that the other side connects to."""
        return _bind(self._socket, endpoint)

    def connect(self, endpoint: str) -> None:
        """Connect to where the other side listens, or will listen."""
        self._socket.connect(endpoint)

    async def send(self, message: Message) -> None:
        """Queue `message` for the other side."""
        await self._socket.send(encode(message))

    async def receive(self) -> Message:
        """Return the next message."""
        while True:
            message = self._decoder.decode(await self._socket.recv())
            if self._epoch is None or message.epoch == self._epoch:
                return message

    def close(self) -> None:
        """Close at once; what was not sent yet is dropped."""
        self._socket.close(linger=0)


class EngineChannel(AsyncChannel):
    """The server's link to rank 0 of one epoch: sends `RequestBatch`, receives `TokenBatch` and `StatsReport`.

    Rank 0 must listen already. A link that was cut stays so: what was on its way is lost, and must not be missed
    between what came before and what would come after.
    """

    def __init__(self, context: zmq.asyncio.Context, epoch: int, endpoint: str) -> None:
        super().__init__(context, epoch, TokenBatch, StatsReport)
        self.epoch = epoch
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.connect(endpoint)

    async def until_cut(self) -> None:
        """Wait until the link is cut, as it is when rank 0 dies."""
        await self._monitor.recv_multipart()

    def close(self) -> None:
        """See `AsyncChannel`."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        super().close()


class StatusChannel(AsyncChannel):
    """The server's end of the orchestrator's reports: receives `GroupStatus` of every epoch."""

    def __init__(self, context: zmq.asyncio.Context, endpoint: str) -> None:
        super().__init__(context, None, GroupStatus)
        self._endpoint = endpoint
        self.bind(endpoint)

    def listen_again(self) -> None:
        """Be there for who connects from now on, where what cleans /tmp up has removed the socket."""
        if not Path(self._endpoint.removeprefix("ipc://")).exists():
            self.bind(self._endpoint)
