"""One log line for each request: who asked for which path, and how it went. Never a body, a header or a query."""

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.protocol.logs import fields_of

LOGGER = logging.getLogger("ryzanstein.access")
QUIET_PATHS = ("/health", "/ready", "/metrics")  # asked every few seconds, by machines


class AccessLog:
    """ASGI middleware that writes the line when the response has ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        status, begin = 0, time.perf_counter()

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noting_status)
        finally:
            _write(scope, status, time.perf_counter() - begin)


def _write(scope: Scope, status: int, seconds: float) -> None:
    path = scope["path"].removeprefix(scope["root_path"])
    level = logging.DEBUG if path in QUIET_PATHS else logging.INFO
    client = "{}:{}".format(*scope["client"]) if scope.get("client") else "-"
    outcome = status or "closed"  # the client went away before an answer began
    words = client, scope["method"], _printable(path), outcome, seconds
    names = "client", "method", "path", "status", "seconds"
    fields = fields_of(**dict(zip(names, words, strict=True)))
    LOGGER.log(level, "%s %s %s %s %.3fs", *words, extra=fields)


def _printable(path: str) -> str:
    return path.encode("unicode_escape").decode()
