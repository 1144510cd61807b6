"""Every error of the API has OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.logs import REQUEST_ID

INVALID_REQUEST = "invalid_request_error"
INTERNAL = "internal_error"
UNAVAILABLE = "service_unavailable"
RATE_LIMIT = "rate_limit_error"
TIMEOUT = "timeout"


class APIError(Exception):
    """Ends a request with an HTTP status and a message for the person who sent it.

    `retry_after`: in how many seconds it may be sent again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str = "",
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.type, self.param, self.code = message, status, type, param, code or None
        self.retry_after = 1 if retry_after is None and status == HTTPStatus.SERVICE_UNAVAILABLE else retry_after

    def body(self) -> bytes:
        """Return the JSON that a client sees."""
        return msgspec.json.encode(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        )

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """Return this error as an HTTP response."""
        extra = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return Response(self.body(), self.status, {**extra, **(headers or {})}, "application/json")


def not_ready(message: str) -> APIError:
    """Return the error for a request that comes while the engine does not take any."""
    return APIError(message, status=503, type=UNAVAILABLE, code="engine_not_ready")


def engine_failed(message: str) -> APIError:
    """Return the error for a request that the engine could not finish."""
    return APIError(message, status=500, type=INTERNAL, code="engine_error")


def too_many(message: str, code: str, retry_after: int) -> APIError:
    """Return the error for a request that exceeds what the service, or its key, has room for at present."""
    return APIError(message, status=429, type=RATE_LIMIT, code=code, retry_after=retry_after)


def timed_out(seconds: float) -> APIError:
    """Return the error for a request that was not finished within `seconds`."""
    return APIError(f"The request was not finished within {seconds:g} seconds.", status=504, type=TIMEOUT, code=TIMEOUT)


def install_error_handlers(app: FastAPI) -> None:
    """Make `app` answer in OpenAI's shape whatever goes wrong."""
    app.add_exception_handler(APIError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_exception)


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return error.response()


async def _on_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return from_validation(error.errors(), error.body).response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ValueError | RecursionError):  # not UTF-8, too long a number, too deep
        reason = str(error.__cause__).partition(";")[0]  # without Python's advice on how to allow longer numbers
        return APIError(f"The body is not valid JSON: {reason}.", code="invalid_json").response()
    messages = {
        404: f"Unknown request URL: {request.method} {request.url.path}.",
        405: f"Not allowed to {request.method} on {request.url.path}.",
    }
    message = messages.get(error.status_code, str(error.detail))
    codes = {404: "unknown_url", 405: "method_not_supported", 413: "body_too_large"}
    kind = INVALID_REQUEST if error.status_code < 500 else INTERNAL
    api_error = APIError(message, status=error.status_code, type=kind, code=codes.get(error.status_code, ""))
    return api_error.response(error.headers)


async def _on_exception(_: Request, __: Exception) -> Response:
    message = f"The server failed on this request; its log says why, under the request's id {REQUEST_ID.get()}."
    return APIError(message, status=500, type=INTERNAL).response()


_NO_OBJECT = {
    type(None): "The body must be a JSON object; it is empty, or null.",
    bytes: "The body must be sent with content-type application/json.",
}


def from_validation(errors: Sequence[Mapping[str, Any]], body: object) -> APIError:
    """Return the API error for what pydantic found first in `body`, which is bytes where it was not sent as JSON."""
    first = errors[0]
    kind, param = first["type"], field_path(_location(first))
    if kind == "json_invalid":
        return APIError(f"The body is not valid JSON: {first['ctx']['error']}.", code="invalid_json")
    if param is None:
        return APIError(_NO_OBJECT.get(type(body), "The body must be a JSON object."), code="invalid_body")
    if kind == "extra_forbidden":
        return APIError(f"Unrecognized request argument supplied: {param}.", param=param, code="unknown_parameter")
    if kind == "missing":
        message = f"Missing required parameter: {param}."
        return APIError(message, param=param, code="missing_required_parameter")
    code = kind if kind in ("unsupported_value", "context_length_exceeded") else "invalid_value"
    return APIError(f"{param}: {first['msg']}.", param=param, code=code)


def _location(error: Mapping[str, Any]) -> list[str | int]:
    """Return where the error is; one found in an object as a whole may be about one field of it."""
    field = error.get("ctx", {}).get("field")
    return [*error["loc"], *([] if field is None else [field])]


def field_path(location: Sequence[str | int]) -> str | None:
    """Return `messages[0].content` for ("body", "messages", 0, "content"); None for the body itself."""
    path = ""
    for part in location[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".") if len(location) > 1 else None
