"""Responses that notice when the client goes away, or takes nothing: server-sent events, and the wait for an answer."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import APIError
from server.generation import Completion, Generation
from server.http_protocol import BoundedHTTPProtocol
from server.streams import Stream, StreamStore

T = TypeVar("T")

MOST_UNSENT = 1 << 20  # bytes of events that wait for a client; a stream with more leaves the engine until it has less
PIECE = 1 << 16  # bytes that are sent at once, about


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, which is cancelled when the client goes away.

    Raises:
        ClientDisconnect: when it did.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def collect(request: Request, generation: Generation) -> list[Completion]:
    """Return the whole of every choice; see `Generation.collect` and `while_connected`."""
    return await while_connected(request.receive, generation.collect())


class EventStream(Response):
    """Server-sent events: those of a new stream, or those after one that the client has already.

    A new stream's response begins with its first event: an error before that still has its own status. A later one is
    the stream's last event.
    """

    media_type = "text/event-stream"

    def __init__(self, streams: StreamStore, stream: Stream, after: int | None = None) -> None:
        """Prepare the response.

        Args:
            streams: where it is kept for clients that come back.
            stream: what to send.
            after: id of the event after which to go on; None: the stream is new.
        """
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._streams = streams
        self._stream = stream
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, or as much of it as the client stays for."""
        connection = scope["state"]["connection"]
        assert isinstance(connection, BoundedHTTPProtocol)
        try:
            await while_connected(receive, self._run(connection, scope, receive, send))
        except ClientDisconnect:
            return

    async def _run(self, connection: BoundedHTTPProtocol, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stream.read_by(connection):
            try:
                await self._begin()
            except APIError as error:
                await error.response()(scope, receive, send)
                return
            if self._after == self._stream.log.last_id and self._stream.has_ended:
                await Response(status_code=204)(scope, receive, send)  # which tells a browser not to come back again
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._send_events(connection, send, self._after or 0)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _begin(self) -> None:
        """Have the engine begin or go on.

        Raises:
            APIError: when there is no event to begin with.
        """
        stream = self._stream
        if self._after is None:
            await stream.begin()
            self._streams.add(stream)
        elif stream in self._streams:
            stream.go_on()
        else:  # it went a moment ago
            raise self._streams.not_found(stream.stream_id)

    async def _send_events(self, connection: BoundedHTTPProtocol, send: Send, event_id: int) -> None:
        """Send all events after `event_id`, as they come and the client takes them."""
        stream = self._stream
        while not (stream.has_ended and event_id == stream.log.last_id):
            if event_id == stream.log.last_id:
                await stream.advance()
            elif connection.is_writable:
                piece, event_id = stream.log.after(event_id, PIECE)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                stream.note_sent(event_id)
            else:
                await self._wait_for_client(connection, event_id)

    async def _wait_for_client(self, connection: BoundedHTTPProtocol, event_id: int) -> None:
        """Wait until the client takes more. What comes meanwhile is kept, as far as that is bearable."""
        stream = self._stream
        writable = asyncio.ensure_future(connection.until_writable())
        try:
            while not stream.has_ended and stream.log.num_bytes_after(event_id) < MOST_UNSENT:
                if await _first(writable, stream.advance()):
                    return
            stream.suspend()
            await writable
            stream.go_on()
        finally:
            writable.cancel()


async def _first(one: "asyncio.Future[None]", other: Coroutine[Any, Any, None]) -> bool:
    """Wait for either; return whether `one` is done. The other is cancelled then."""
    working = asyncio.ensure_future(other)
    try:
        await asyncio.wait((one, working), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        return one.done()
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
