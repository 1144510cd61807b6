"""`GET /v1/streams/{stream_id}`: the rest of a stream whose connection broke."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response

from server.api.fields import shown
from server.errors import APIError
from server.middleware.auth import key_name
from server.routes.documentation import STREAM_RESPONSES
from server.service import ServiceOf
from server.streaming import EventStream

router = APIRouter()
MOST_DIGITS = 18  # of an event's id: more than any stream comes to


@router.get(
    "/v1/streams/{stream_id}",
    response_class=Response,
    responses=STREAM_RESPONSES,
    tags=["generation"],
    summary="Go on with a stream",
)
async def resume_stream(
    stream_id: str,
    request: Request,
    service: ServiceOf,
    last_event_id: Annotated[str | None, Header(description="Send the events after this one.")] = None,
) -> Any:
    """Return a stream's events after the last one that the client has: those that there are, then those that come."""
    stream = service.streams.find(stream_id, key_name(request.scope))
    after = 0 if last_event_id is None else _event_id(last_event_id)
    if after > stream.log.last_id:
        raise _wrong(f"{after} is beyond the stream's last event, {stream.log.last_id}")
    return EventStream(service.streams, stream, after)


def _event_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS):
        raise _wrong(f"{shown(text)} is not the number of an event")
    return int(text)


def _wrong(problem: str) -> APIError:
    return APIError(f"Last-Event-ID: {problem}.", param="Last-Event-ID", code="invalid_value")
