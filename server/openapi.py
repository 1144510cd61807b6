"""What /openapi.json says of every operation, beyond what its route does: the key, and the errors on the way to it."""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

from server.middleware.auth import is_open

DESCRIPTION = "OpenAI-compatible API. Every field works, or is refused with an error that names it."
ERROR_CONTENT = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
UNAUTHORIZED = {"description": "The API key is missing or wrong.", "content": ERROR_CONTENT}
TOO_MANY = {"description": "The API key is used as much as it may be; try again later.", "content": ERROR_CONTENT}
TOO_LARGE = {"description": "The body is larger than is allowed.", "content": ERROR_CONTENT}
KEY = "API key"


class API(FastAPI):
    """The application; its schema leaves out FastAPI's own validation error, which is never sent."""

    def __init__(self, *, version: str, is_locked: bool) -> None:
        super().__init__(
            title="ryzanstein",
            version=version,
            description=DESCRIPTION,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,  # to a host that the request names
        )
        self._is_locked = is_locked

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI schema."""
        if self.openapi_schema is None:
            schema = super().openapi()
            for path, operation in _operations(schema):
                operation["responses"].pop("422", None)
                if "requestBody" in operation:
                    operation["responses"]["413"] = TOO_LARGE
                if self._is_locked and not is_open(path):
                    operation["responses"]["401"] = UNAUTHORIZED
                    operation["responses"].setdefault("429", TOO_MANY)
                    operation["security"] = [{KEY: []}]
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            if self._is_locked:
                schema["components"]["securitySchemes"] = {KEY: {"type": "http", "scheme": "bearer"}}
        assert self.openapi_schema is not None
        return self.openapi_schema


def _operations(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((path, operation) for path, methods in schema["paths"].items() for operation in methods.values())
