"""What becomes of requests while too many wait: they are refused before anything of them is read."""

from starlette.types import ASGIApp, Receive, Scope, Send

from server.admission import AdmissionQueue
from server.errors import APIError
from server.middleware.auth import key_name

GENERATION_PATHS = ("/v1/completions", "/v1/chat/completions")


class Overload:
    """ASGI middleware: answers as the queue does (429, or 503 while no requests are taken) where a key has no room.

    Reading and checking a body takes time that those who were accepted need.
    """

    def __init__(self, app: ASGIApp, queue: AdmissionQueue) -> None:
        self._app = app
        self._queue = queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["method"] == "POST" and scope["path"].removeprefix(scope["root_path"]) in GENERATION_PATHS:
            try:
                self._queue.require_room(key_name(scope))
            except APIError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)
