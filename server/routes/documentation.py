"""What /openapi.json says of the answers that FastAPI cannot see."""

from typing import Any

from server.api.responses import ErrorResponse

_Responses = dict[int | str, dict[str, Any]]

NOT_FOUND: _Responses = {404: {"model": ErrorResponse, "description": "No such model."}}
BAD_REQUEST: _Responses = {
    400: {"model": ErrorResponse, "description": "The request cannot be served; `param` names the field."}
}
TEXT_RESPONSES: _Responses = {
    **BAD_REQUEST,
    **NOT_FOUND,
    503: {"model": ErrorResponse, "description": "The service is ending."},
}
_EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}
STREAM_RESPONSES: _Responses = {
    200: {"description": "Server-sent events, as of the stream itself.", "content": _EVENTS},
    204: {"description": "The client has the stream's last event."},
    400: {"model": ErrorResponse, "description": "Last-Event-ID is not the number of an event of the stream."},
    404: {"model": ErrorResponse, "description": "There is no such stream, or not any more."},
    429: {"model": ErrorResponse, "description": "The API key has as many requests in progress as it may have."},
}
GENERATION_RESPONSES: _Responses = {
    200: {
        "description": "The whole answer or, with `stream`, server-sent events that each hold a chunk of it; "
        "the last is `data: [DONE]`.",
        "content": _EVENTS,
    },
    **BAD_REQUEST,
    **NOT_FOUND,
    429: {"model": ErrorResponse, "description": "There is too much to do; `Retry-After` says when to try again."},
    500: {"model": ErrorResponse, "description": "The engine could not finish the request."},
    503: {"model": ErrorResponse, "description": "The engine is not ready."},
    504: {"model": ErrorResponse, "description": "The request was not finished in time."},
}
