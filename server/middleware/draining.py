"""What becomes of requests while the service ends."""

from starlette.types import ASGIApp, Receive, Scope, Send

from server.drain import Drain
from server.errors import UNAVAILABLE, APIError

STREAMS_FOLDER = "/v1/streams/"


class Draining:
    """ASGI middleware: counts the requests that an end waits for, and answers 503 to those that come after it began.

    Those that ask how the service is are neither. A client may come back to its stream: that was accepted before.
    """

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        is_new = scope["method"] == "POST"
        if is_new and self._drain.is_draining:
            await _shutting_down().response()(scope, receive, send)
        elif is_new or scope["path"].removeprefix(scope["root_path"]).startswith(STREAMS_FOLDER):
            with self._drain.request():
                await self._app(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _shutting_down() -> APIError:
    return APIError("The server is shutting down.", status=503, type=UNAVAILABLE, code="shutting_down")
