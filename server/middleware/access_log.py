"""Request ids, and one log line for each request, without its body."""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOGGER = logging.getLogger("ryzanstein.access")
REQUEST_ID_HEADER = "x-request-id"
QUIET_PATHS = ("/health", "/ready", "/metrics")  # asked every few seconds, by machines
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class AccessLog:
    """ASGI middleware: takes the client's `X-Request-Id` or makes one, returns it, and writes it to the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        status, begin = 0, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            _write(scope, status, time.perf_counter() - begin, request_id)


def _request_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _write(scope: Scope, status: int, seconds: float, request_id: str) -> None:
    level = logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO
    client = "{}:{}".format(*scope["client"]) if scope.get("client") else "-"
    outcome = status or "closed"  # the client went away before an answer began
    path = scope["path"].encode("unicode_escape").decode()
    LOGGER.log(level, "%s %s %s %s %.3fs %s", client, scope["method"], path, outcome, seconds, request_id)
