"""The FastAPI application."""

from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp

from server.config import ServerConfig
from server.credentials import Credentials
from server.errors import install_error_handlers
from server.middleware.access_log import AccessLog
from server.middleware.auth import APIKeyAuth
from server.middleware.body_limit import BodyLimit
from server.middleware.request_id import REQUEST_ID_HEADER, RequestID
from server.routes import chat, completions, docs, health, models, tokenize
from server.service import Service

DESCRIPTION = "OpenAI-compatible API. Every field works, or is refused with an error that names it."
EXPOSED_HEADERS = (REQUEST_ID_HEADER, "retry-after")
CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody reads it, the access log shows it


class API(FastAPI):
    """The application; its schema leaves out FastAPI's own validation error, which is never sent."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI schema."""
        if self.openapi_schema is None:
            schema = super().openapi()
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
        assert self.openapi_schema is not None
        return self.openapi_schema


def create_app(service: Service, config: ServerConfig, credentials: Credentials) -> ASGIApp:
    """Return the application that serves `service`, and all that is around it."""
    app: ASGIApp = _api(service)
    if credentials.api_key is not None:
        app = APIKeyAuth(app, credentials.api_key)
    app = BodyLimit(app, config.max_body_size)
    if config.allowed_origins:  # outside of the others: pages may read errors, and ask without a key what is allowed
        app = CORSMiddleware(
            app,
            allow_origins=config.allowed_origins,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            allow_credentials=config.allow_credentials,
            expose_headers=EXPOSED_HEADERS,
        )
    if config.access_log:
        app = AccessLog(app)
    return RequestID(app)


def _api(service: Service) -> FastAPI:
    app = API(title="ryzanstein", version=health.VERSION, description=DESCRIPTION, docs_url=None, redoc_url=None)
    app.state.service = service
    for module in (completions, chat, tokenize, models, health, docs):
        app.include_router(module.router)
    app.mount(docs.ASSETS_PATH, docs.ASSETS)
    install_error_handlers(app)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    return app


async def _on_disconnect(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
