"""Bounds that uvicorn leaves to a proxy: how long a request's header may be, and how long a client may take.

That is for a request to arrive, and for an answer to be taken.
"""

import asyncio
import fcntl
import logging
import termios
import uuid
from array import array
from collections.abc import Callable
from http import HTTPStatus

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from engine.protocol.logs import fields_of
from server.errors import APIError
from server.middleware.request_id import REQUEST_ID_HEADER

LOGGER = logging.getLogger("ryzanstein.access")
MAX_HEADER_SIZE = 64 * 1024  # request line and header fields; trailers; what comes before a chunk
ARRIVAL_SECONDS = 60.0  # for a whole request, from its first byte
LOOKS = 4  # at a client that takes nothing, before its time is up


class BoundedHTTPProtocol(HttpToolsProtocol):
    """One connection. What breaks HTTP or a bound is answered in OpenAI's shape, and the connection closed.

    Requests find it as `connection` in their scope's state.
    """

    arrival_seconds = ARRIVAL_SECONDS
    slow_client_timeout: float  # seconds without a byte taken, after which the connection is closed …
    on_slow_client: Callable[[], object]  # … and this is called
    keeps_connections: Callable[[], bool]  # whether another request may come on a connection
    _patience: asyncio.TimerHandle | None = None
    _arrival: asyncio.TimerHandle | None = None
    _header_size = 0  # of this request's line, header fields and trailers
    _is_header_complete = False
    _unclaimed = 0  # bytes since the last piece of a body: all of them belong to one header

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give the client as long for its first request as for the next ones."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._end_arrival()
        self._end_patience()

    def pause_writing(self) -> None:
        """Enough waits for the client."""
        super().pause_writing()
        self._watch(self.num_untaken, LOOKS)

    def resume_writing(self) -> None:
        """The client has taken most of what waited."""
        super().resume_writing()
        self._end_patience()

    @property
    def is_writable(self) -> bool:
        """Whether there is room for what is to be sent."""
        return not self.flow.write_paused

    async def until_writable(self) -> None:
        """Wait until there is room, or the connection lost."""
        await self.flow.drain()

    def close_when_idle(self) -> None:
        """Take no further request: close now, or behind the answer to the one that is here or on its way."""
        latest = self._latest()
        if self._arrival is None or (latest is not None and not latest.response_complete):
            self.shutdown()

    def abort(self) -> None:
        """Close the connection at once, whatever waits for the client."""
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take the next bytes, of a request or of several."""
        self._begin_arrival()
        self._unclaimed += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._unclaimed > MAX_HEADER_SIZE and not self.transport.is_closing():
            self._refuse_header()

    def on_message_begin(self) -> None:
        """Take the first byte of a request, which may share a packet with the end of another."""
        super().on_message_begin()
        self._header_size, self._is_header_complete = 0, False
        self.scope["state"]["connection"] = self
        self._begin_arrival()

    def on_url(self, url: bytes) -> None:
        """Take a piece of the URL."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header field. Trailers are dropped: what they say comes after it was asked for."""
        self._count(len(name) + len(value) + len(": \r\n"))
        if not self._is_header_complete:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Take a whole header."""
        self._is_header_complete = True
        if self.parser.get_method() == b"CONNECT":
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "CONNECT is not possible: this is no proxy.")
            raise ValueError  # ends the parsing
        if any(name == b"transfer-encoding" and value.lower() != b"chunked" for name, value in self.headers):
            self._refuse(HTTPStatus.NOT_IMPLEMENTED, "No Transfer-Encoding but chunked is possible.")
            raise ValueError
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            self.cycle.keep_alive = self.cycle.keep_alive and self.keeps_connections()

    def on_chunk_header(self) -> None:
        """Take the announcement of a chunk."""
        self._unclaimed = 0

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        super().on_body(body)
        self._unclaimed = 0

    def on_message_complete(self) -> None:
        """Take the last byte of a request."""
        if self.parser.should_upgrade():
            return  # it is parsed again, as one with a body
        super().on_message_complete()
        self._unclaimed = 0
        self._end_arrival()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        if not self.transport.is_closing():
            self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def _parse(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                data = self._header_without_upgrade() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            except httptools.HttpParserError:
                self.send_400_response("The request is not HTTP that can be understood.")
                break

    def _header_without_upgrade(self) -> bytes:
        """Return the header of a request whose wish for another protocol is ignored: for the parser it has no body."""
        version = self.parser.get_http_version().encode()
        fields = [b"%s: %s\r\n" % field for field in self.headers if field[0] != b"upgrade"]
        return b"%s %s HTTP/%s\r\n%s\r\n" % (self.parser.get_method(), self.url, version, b"".join(fields))

    def _count(self, size: int) -> None:
        self._header_size += size
        if self._header_size > MAX_HEADER_SIZE:
            self._refuse_header()
            raise ValueError  # ends the parsing

    def _begin_arrival(self) -> None:
        if self._arrival is None:
            self._arrival = self.loop.call_later(self.arrival_seconds, self._on_late)

    def _end_arrival(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _watch(self, num_untaken: int, looks: int) -> None:
        """Look again and again whether the client takes something of what waits for it."""
        delay = self.slow_client_timeout / LOOKS
        self._patience = self.loop.call_later(delay, self._look, num_untaken, looks - 1)

    def _look(self, num_before: int, looks: int) -> None:
        num_untaken = self.num_untaken
        if num_untaken < num_before:
            self._watch(num_untaken, LOOKS)
        elif looks:
            self._watch(num_before, looks)
        else:
            self.on_slow_client()
            self.abort()

    @property
    def num_untaken(self) -> int:
        """Bytes that wait for the client, here and in the system."""
        in_system = array("i", (0,))
        fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, in_system)
        return in_system[0] + self.transport.get_write_buffer_size()

    def _end_patience(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _latest(self) -> RequestResponseCycle | None:
        return self.cycle  # None before the first request, whatever its annotation says

    def _on_late(self) -> None:
        self._arrival = None
        latest = self._latest()
        if self.pipeline or (latest is not None and not (latest.more_body or latest.response_complete)):
            self._begin_arrival()  # it is the client that waits, for an earlier answer
        else:
            message = f"The request did not arrive within {self.arrival_seconds:.0f} seconds."
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, message)

    def _refuse_header(self) -> None:
        message = f"The request's header is larger than the {MAX_HEADER_SIZE} bytes that are allowed."
        self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        """Answer where no request has reached the application, and close."""
        request_id = uuid.uuid4().hex
        client = "{}:{}".format(*self.client) if self.client else "-"
        fields = fields_of(request_id=request_id, client=client, status=status)
        LOGGER.info("%s %d %s [%s]", client, status, message, request_id, extra=fields)
        latest = self._latest()
        if latest is None or latest.response_complete or not latest.response_started:
            body = APIError(message).body()
            header = (
                f"HTTP/1.1 {status} {status.phrase}\r\n{REQUEST_ID_HEADER}: {request_id}\r\nconnection: close\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            )
            self.transport.write(header.encode() + body)
        self.transport.close()


def protocol_of(
    slow_client_timeout: float, on_slow_client: Callable[[], object], keeps_connections: Callable[[], bool]
) -> type[BoundedHTTPProtocol]:
    """Return the class of a server's connections.

    Args:
        slow_client_timeout: seconds without a byte taken after which a client is disconnected.
        on_slow_client: is called then.
        keeps_connections: says of each request whether another may come on its connection.
    """
    members = {
        "slow_client_timeout": slow_client_timeout,
        "on_slow_client": staticmethod(on_slow_client),
        "keeps_connections": staticmethod(keeps_connections),
    }
    return type("HTTPProtocol", (BoundedHTTPProtocol,), members)
