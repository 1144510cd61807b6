"""Responses that notice when the client goes away: server-sent events, and the wait for a whole answer."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.chunks import ChunkEncoder
from server.api.responses import UsageCounts
from server.errors import APIError
from server.generation import Completion, Generation

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


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


async def events_of(generation: Generation, encoder: ChunkEncoder, include_usage: bool) -> AsyncGenerator[bytes, None]:
    """Yield the stream's bytes; tokens that arrived together come in one piece.

    Raises:
        APIError: see `Generation.deltas`.
    """
    async with aclosing(generation.deltas()) as arriving:
        async for deltas in arriving:
            piece = b"".join(map(encoder.encode, deltas))
            if piece:
                yield piece
    yield (encoder.encode_usage(usage_of(generation)) if include_usage else b"") + DONE


def usage_of(generation: Generation) -> UsageCounts:
    """Return the token counts so far."""
    prompt, completion = generation.num_prompt_tokens, generation.num_completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens},
    }


class EventStream(Response):
    """Server-sent events.

    The response begins with its first event: an error before that still has its own status. A later one is sent as the
    stream's last event.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, or as much of it as the client stays for."""
        try:
            await while_connected(receive, self._run(scope, receive, send))
        except ClientDisconnect:
            return

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                first = await anext(events)
            except APIError as error:
                await error.response()(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _send(send, first)
            try:
                async for piece in events:
                    await _send(send, piece)
            except APIError as error:
                await _send(send, b"data: " + error.body() + b"\n\n")
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
