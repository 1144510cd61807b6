"""Who may use the API, and how much of it: those who know one of its keys, within that key's limits."""

import hmac
import math
import time
from collections import deque
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api_keys import ANONYMOUS, APIKey
from server.errors import APIError, too_many
from server.metrics.metrics import Metrics
from server.metrics.table import CONCURRENCY_LIMITED, RATE_LIMITED
from server.middleware.draining import STREAMS_FOLDER

OPEN_PATHS = ("/health", "/ready", "/metrics", "/version", "/docs", "/openapi.json")  # all others need a key
OPEN_FOLDER = "/docs/assets/"
MINUTE = 60.0  # seconds
_SCOPE_KEY = "api_key_name"


class APIKeyAuth:
    """ASGI middleware: answers 401 unless the request has `Authorization: Bearer KEY`, 429 beyond the key's limits."""

    def __init__(self, app: ASGIApp, keys: Iterable[APIKey], metrics: Metrics) -> None:
        self._app = app
        self._accounts = [_Account(key) for key in keys]
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        path = scope["path"].removeprefix(scope["root_path"])
        if is_open(path):
            await self._app(scope, receive, send)
        elif (account := self._account(scope)) is None:
            await _unauthorized().response({"www-authenticate": "Bearer"})(scope, receive, send)
        elif (refusal := account.refusal(time.monotonic(), is_new=not path.startswith(STREAMS_FOLDER))) is not None:
            self._metrics.rejected.labels(str(refusal.code)).inc()
            await refusal.response()(scope, receive, send)
        else:
            with account:
                await self._app({**scope, _SCOPE_KEY: account.name}, receive, send)

    def _account(self, scope: Scope) -> "_Account | None":
        credentials = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(credentials) != 1:
            return None
        scheme, _, key = credentials[0].partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        known = [account for account in self._accounts if account.has(key.strip(b" "))]  # all are looked at
        return known[0] if known else None


class _Account:
    """What one key has been used for; it is entered for the time of each request."""

    def __init__(self, key: APIKey) -> None:
        self.name = key.name
        self._key = key.key.encode()
        self._limits = key
        self._begun: deque[float] = deque(maxlen=key.requests_per_minute)  # when the last requests came
        self._num_running = 0

    def has(self, key: bytes) -> bool:
        """Whether `key` is this one, told in a time that does not depend on it."""
        return hmac.compare_digest(key, self._key)

    def refusal(self, now: float, *, is_new: bool = True) -> APIError | None:
        """Return the error for a request that comes now; or None, and count it as one of the minute's if it is new."""
        most, begun = self._limits.max_concurrent_requests, self._begun
        if most is not None and self._num_running >= most:
            message = f"This API key may have {most} requests at once, and has."
            return too_many(message, CONCURRENCY_LIMITED, 1)
        if begun.maxlen is not None and is_new:
            if len(begun) == begun.maxlen and now - begun[0] < MINUTE:
                message = f"This API key may send {begun.maxlen} requests a minute, and has."
                return too_many(message, RATE_LIMITED, math.ceil(MINUTE - (now - begun[0])))
            begun.append(now)
        return None

    def __enter__(self) -> None:
        self._num_running += 1

    def __exit__(self, *_: object) -> None:
        self._num_running -= 1


def key_name(scope: Scope) -> str:
    """Return the name of the key that a request came with."""
    name: str = scope.get(_SCOPE_KEY, ANONYMOUS)
    return name


def is_open(path: str) -> bool:
    """Return whether a path needs no key."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _unauthorized() -> APIError:
    message = "A valid API key is needed, sent as `Authorization: Bearer KEY`."
    return APIError(message, status=401, code="invalid_api_key")
