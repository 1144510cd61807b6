"""Streamed answers that outlive their connection: whoever comes back in time gets the rest, and nothing twice."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from typing import Protocol

from server.api.chunks import ChunkEncoder
from server.api.fields import shown
from server.api.responses import UsageCounts
from server.choice import Delta
from server.errors import APIError
from server.event_log import EventLog
from server.generation import Generation
from server.metrics.metrics import Metrics

DONE = b"[DONE]"
STREAM_BYTES = 2048  # of a stream besides its events and its tokens, about
TOKEN_BYTES = 48  # of a token of a prompt or of what was received, about


class Connection(Protocol):
    """A client that reads a stream."""

    def abort(self) -> None:
        """Close the connection at once."""


class Stream:
    """One streamed answer: the events that there are, and the generation that makes the others.

    One connection at a time reads it: the next that wants it takes it over, since the one before may be broken without
    anybody having noticed.
    """

    def __init__(
        self, store: "StreamStore", generation: Generation, encoder: ChunkEncoder, *, include_usage: bool, owner: str
    ) -> None:
        """Begin the stream.

        Args:
            store: keeps it while nobody reads it.
            generation: what it shows.
            encoder: writes the chunks.
            include_usage: whether the last of them has the token counts.
            owner: name of the API key that may read it.
        """
        self.stream_id = generation.response_id
        self.owner = owner
        self.log = EventLog(encoder.head)
        self.has_ended = False  # no more events will come
        self._store = store
        self._generation = generation
        self._num_prompt_tokens = generation.num_prompt_tokens
        self._encoder = encoder
        self._include_usage = include_usage
        self._reader: Connection | None = None
        self._is_free = asyncio.Event()
        self._num_claims = 0  # connections that read it or want to

    @property
    def num_bytes(self) -> int:
        """How much memory it takes, about."""
        num_tokens = 0 if self.has_ended else self._num_prompt_tokens + self.log.last_id
        return STREAM_BYTES + self.log.num_bytes + num_tokens * TOKEN_BYTES

    @asynccontextmanager
    async def read_by(self, connection: Connection) -> AsyncGenerator[None, None]:
        """Take the stream over from whoever reads it. When nobody does any more, its sequences leave the engine."""
        self._num_claims += 1
        self._store.hold(self)
        try:
            while self._reader is not None:
                self._reader.abort()
                await self._is_free.wait()
            self._reader = connection
            self._is_free.clear()
            try:
                yield
            finally:
                self._reader = None
                self._is_free.set()
        finally:
            self._num_claims -= 1
            if not self._num_claims:
                self._store.release(self)

    async def begin(self) -> None:
        """Have the engine begin, and wait for the first event.

        Raises:
            APIError: when it takes no requests, or could not finish this one.
        """
        self._generation.submit()
        while not self.log.last_id:
            await self.advance()

    def go_on(self) -> None:
        """Have the engine go on after `suspend`."""
        if not self.has_ended:
            try:
                self._generation.submit()
            except APIError as error:
                self._fail(error)

    async def advance(self) -> None:
        """Wait for what comes, and make events of it, if it makes any. An error is an event, too: the last.

        Raises:
            APIError: when there are no events yet.
        """
        try:
            self._add(await self._generation.next())
        except APIError as error:
            if not self.log.last_id:
                raise
            self._fail(error)
        self._store.measure(self)

    def suspend(self) -> None:
        """Take what has not finished out of the engine, until `go_on`."""
        if not self.has_ended:
            self._generation.withdraw()

    def end(self) -> None:
        """Give up what has not finished."""
        if not self.has_ended:
            self._end()

    def note_sent(self, event_id: int) -> None:
        """The events up to `event_id` were sent: they are of no more use unless the stream is kept."""
        if self not in self._store:
            self.log.drop(event_id)

    def _add(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            for chunk in self._encoder.encode(delta):
                self.log.append(chunk)
        if self._generation.has_ended:
            if self._include_usage:
                self.log.append(self._encoder.encode_usage(usage_of(self._generation)))
            self.log.append(DONE)
            self._end()

    def _fail(self, error: APIError) -> None:
        self.log.append(error.body())
        self._end()

    def _end(self) -> None:
        self.has_ended = True
        self._generation.abort()
        # Prompts, and what texts are made with, are not needed any more.
        del self._generation, self._encoder


class StreamStore:
    """The streams that a client can come back to, each until nobody has read it for a while.

    Args:
        seconds: how long it is kept then; 0: none is.
        most_bytes: what all may take together. Beyond, those go that nobody has read for longest; if none is left to
            go, the stream that grows cannot be come back to.
        metrics: show them.
    """

    def __init__(self, seconds: float, most_bytes: int, metrics: Metrics) -> None:
        self._seconds = seconds
        self._most_bytes = most_bytes
        self._resumptions = metrics.stream_resumptions
        self._num_bytes: dict[str, int] = {}  # of each stream …
        self._total = 0  # … and of all
        self._streams: dict[str, Stream] = {}
        self._left: dict[str, asyncio.TimerHandle] = {}  # streams that nobody reads, and what ends them
        metrics.streams_kept.set_function(lambda: len(self._left))
        metrics.streams_kept_bytes.set_function(lambda: self._total)

    def __contains__(self, stream: Stream) -> bool:
        return stream.stream_id in self._streams

    def add(self, stream: Stream) -> None:
        """Let clients come back to `stream`, which has an event and so an id that they know."""
        if self._seconds:
            self._streams[stream.stream_id] = stream
            self._num_bytes[stream.stream_id] = 0
            self.measure(stream)

    def find(self, stream_id: str, owner: str) -> Stream:
        """Return a stream.

        Raises:
            APIError: (404) when it is not there, or another's.
        """
        stream = self._streams.get(stream_id)
        if stream is None or stream.owner != owner:
            raise self.not_found(stream_id)
        return stream

    def not_found(self, stream_id: str) -> APIError:
        """Return the error for a stream that is not there."""
        kept = f"streams are kept for {self._seconds:g} s after their connection has ended"
        message = f"There is no stream {shown(stream_id)}: {kept if self._seconds else 'streams are not kept here'}."
        return APIError(message, status=404, code="stream_not_found")

    def hold(self, stream: Stream) -> None:
        """Somebody wants to read `stream`; if it is here, not for the first time."""
        if stream in self:
            self._resumptions.inc()
        timer = self._left.pop(stream.stream_id, None)
        if timer is not None:
            timer.cancel()

    def release(self, stream: Stream) -> None:
        """Nobody reads `stream` any more: keep it for a while, out of the engine."""
        if stream not in self:
            stream.end()
            return
        stream.suspend()
        loop = asyncio.get_running_loop()
        self._left[stream.stream_id] = loop.call_later(self._seconds, self._drop, stream.stream_id)
        self.measure(stream)

    def measure(self, stream: Stream) -> None:
        """Note how large `stream` is now, and make room if that is too much."""
        if stream not in self:
            return
        before, now = self._num_bytes[stream.stream_id], stream.num_bytes
        self._num_bytes[stream.stream_id] = now
        self._total += now - before
        while self._total > self._most_bytes and self._left:
            self._drop(next(iter(self._left)))
        if self._total > self._most_bytes and stream in self:
            self._forget(stream.stream_id)

    def _drop(self, stream_id: str) -> None:
        self._left.pop(stream_id).cancel()
        self._forget(stream_id).end()

    def _forget(self, stream_id: str) -> Stream:
        self._total -= self._num_bytes.pop(stream_id)
        return self._streams.pop(stream_id)


def usage_of(generation: Generation) -> UsageCounts:
    """Return the token counts so far."""
    prompt, completion = generation.num_prompt_tokens, generation.num_completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens},
    }
