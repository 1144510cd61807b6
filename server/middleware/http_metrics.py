"""How many requests there are, and how they were answered; refusals by other middleware count, too."""

from collections.abc import Iterable
from itertools import product

from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.metrics.metrics import Metrics
from server.metrics.table import METHODS, OTHER_METHOD, UNKNOWN_ROUTE, USUAL_CODES
from server.middleware.overload import GENERATION_PATHS

CLIENT_WENT_AWAY = 499  # before a response began


class HTTPMetrics:
    """ASGI middleware that counts a response when it has ended, by its route's template rather than its path.

    Whatever clients ask for, there are no more series than routes times methods times codes.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute], metrics: Metrics) -> None:
        self._app = app
        self._routes = _Routes(routes)
        self._responses, self._in_progress = metrics.http_responses, metrics.http_in_progress
        for path, code in product(GENERATION_PATHS, USUAL_CODES):
            self._responses.labels(path, "POST", code)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        status = CLIENT_WENT_AWAY
        route = self._routes.template_of(scope["path"].removeprefix(scope["root_path"]))  # which routing changes

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._in_progress.inc()
        try:
            await self._app(scope, receive, send_noting_status)
        finally:
            self._in_progress.dec()
            method = scope["method"] if scope["method"] in METHODS else OTHER_METHOD
            self._responses.labels(route, method, str(status)).inc()


class _Routes:
    """The templates of all paths that there are."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        self._templates: set[str] = set()
        self._patterns = []  # of those with parameters
        for route in routes:
            if isinstance(route, Mount):
                self._patterns.append((route.path_regex, f"{route.path}/{{path}}"))
            elif isinstance(route, Route):
                self._templates.add(route.path)
                if route.param_convertors:
                    self._patterns.append((route.path_regex, route.path_format))

    def template_of(self, path: str) -> str:
        """Return the template that `path` fits."""
        if path in self._templates:
            return path
        fitting = (template for pattern, template in self._patterns if pattern.match(path))
        return next(fitting, UNKNOWN_ROUTE)
