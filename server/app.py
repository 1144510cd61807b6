"""The FastAPI application."""

from typing import Any

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.middleware.access_log import AccessLog
from server.errors import install_error_handlers
from server.routes import chat, completions, docs, health, models
from server.service import Service

DESCRIPTION = "OpenAI-compatible API. Every field works, or is refused with an error that names it."
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


def create_app(service: Service, *, access_log: bool = True) -> FastAPI:
    """Return the application that serves `service`."""
    app = API(title="ryzanstein", version=health.VERSION, description=DESCRIPTION, docs_url=None, redoc_url=None)
    app.state.service = service
    for module in (completions, chat, models, health, docs):
        app.include_router(module.router)
    app.mount(docs.ASSETS_PATH, docs.ASSETS)
    install_error_handlers(app)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    if access_log:
        app.add_middleware(AccessLog)
    return app


async def _on_disconnect(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
