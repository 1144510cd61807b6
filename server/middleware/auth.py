"""Who may use the API: those who know its key."""

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import APIError

OPEN_PATHS = ("/health", "/ready", "/metrics", "/version", "/docs", "/openapi.json")  # all others need the key
OPEN_FOLDER = "/docs/assets/"


class APIKeyAuth:
    """ASGI middleware: answers 401 unless the request has `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._api_key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if is_open(scope["path"].removeprefix(scope["root_path"])) or self._is_authorized(scope):
            await self._app(scope, receive, send)
        else:
            await _unauthorized().response({"www-authenticate": "Bearer"})(scope, receive, send)

    def _is_authorized(self, scope: Scope) -> bool:
        credentials = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(credentials) != 1:
            return False
        scheme, _, key = credentials[0].partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(b" "), self._api_key)


def is_open(path: str) -> bool:
    """Return whether a path needs no key."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _unauthorized() -> APIError:
    message = "A valid API key is needed, sent as `Authorization: Bearer KEY`."
    return APIError(message, status=401, code="invalid_api_key")
