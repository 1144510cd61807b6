"""How large a request's body may be, and what becomes of one that nobody reads."""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyTooLarge(HTTPException):
    """The body exceeds --max-body-size."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, f"The body is larger than the {limit} bytes that are allowed.")


class BodyLimit:
    """ASGI middleware: raises `BodyTooLarge` where the application reads a body beyond the limit.

    A response that comes before the body's end is finished only when the rest has arrived, and is dropped meanwhile:
    a client that sends its whole body before it reads would else find a closed connection instead of the answer.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        body = _Body(scope, receive, send, self._limit)
        await self._app(scope, body.receive, body.send)


class _Body:
    """The body of one request."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        headers = Headers(scope=scope)
        self._receive, self._send, self._limit = receive, send, limit
        self._announced = int(headers.get("content-length", 0))  # digits, or the HTTP server has refused it
        self._arrived = 0
        self._is_complete = "transfer-encoding" not in headers and not self._announced
        self._is_awaited = headers.get("expect", "").lower() == "100-continue"

    async def receive(self) -> Message:
        """Return the next piece of the body."""
        if max(self._announced, self._arrived) > self._limit:
            raise BodyTooLarge(self._limit)
        message = await self._next()
        if self._arrived > self._limit:
            raise BodyTooLarge(self._limit)
        return message

    async def send(self, message: Message) -> None:
        """Send a piece of the response."""
        if message["type"] == "http.response.start" and self._is_awaited:
            # The client waits for leave to send its body. It has none: what comes next on the connection is unknown.
            message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        elif message["type"] == "http.response.body" and not (message.get("more_body") or self._is_complete):
            await self._send({**message, "more_body": True})
            await self._drop_rest()
            message = {"type": "http.response.body"}
        await self._send(message)

    async def _drop_rest(self) -> None:
        while not (self._is_complete or self._is_awaited):
            await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        self._is_awaited = False  # it has been told to continue
        if message["type"] == "http.request":
            self._arrived += len(message["body"])
        self._is_complete = not message.get("more_body", False)
        return message
