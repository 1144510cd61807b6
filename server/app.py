"""The FastAPI application."""

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from server.config import ServerConfig
from server.credentials import Credentials
from server.errors import install_error_handlers
from server.middleware.access_log import AccessLog
from server.middleware.auth import APIKeyAuth
from server.middleware.body_limit import BodyLimit
from server.middleware.cors import CORS
from server.middleware.draining import Draining
from server.middleware.http_metrics import HTTPMetrics
from server.middleware.overload import Overload
from server.middleware.request_id import REQUEST_ID_HEADER, RequestID
from server.openapi import API
from server.routes import chat, completions, docs, health, models, streams, tokenize
from server.service import Service

EXPOSED_HEADERS = (REQUEST_ID_HEADER, "retry-after")
ROUTERS = [module.router for module in (completions, chat, streams, tokenize, models, health, docs)]
CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody reads it, the access log shows it


def create_app(service: Service, config: ServerConfig, credentials: Credentials) -> ASGIApp:
    """Return the application that serves `service`, and all that is around it."""
    api = _api(service, is_locked=bool(credentials.keys))
    app: ASGIApp = Overload(api, service.queue)
    app = Draining(app, service.drain)
    if credentials.keys:
        app = APIKeyAuth(app, credentials.keys, service.metrics)
    app = BodyLimit(app, config.max_body_size)
    if config.allowed_origins:  # outside of the others: pages may read errors, and ask without a key what is allowed
        app = CORS(
            app,
            allow_origins=config.allowed_origins,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            allow_credentials=config.allow_credentials,
            expose_headers=EXPOSED_HEADERS,
        )
    if config.access_log:
        app = AccessLog(app)
    app = service.traces.wrap(app)
    return HTTPMetrics(RequestID(app), _routes(api), service.metrics)


def _api(service: Service, *, is_locked: bool) -> FastAPI:
    app = API(version=health.VERSION, is_locked=is_locked)
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router)
    app.mount(docs.ASSETS_PATH, docs.ASSETS)
    install_error_handlers(app)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    return app


def _routes(app: FastAPI) -> list[BaseRoute]:
    """Return all that requests can get to; FastAPI's own list does not look into the routers it includes."""
    return [*app.routes, *(route for router in ROUTERS for route in router.routes)]


async def _on_disconnect(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
