"""The span of one API request, as those see it who know what happens to the request."""

import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Protocol

from opentelemetry.trace import Span, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.util.types import AttributeValue

from server.errors import APIError

CLIENT_CLOSED_REQUEST = 499  # the status of an answer that nobody waits for
SERVER_ERROR = 500


class Generating(Protocol):
    """What is asked for."""

    def note_end(self) -> None:
        """Record what there is to say at the request's end."""
        ...


class RequestTrace:
    """One request's span, and its children: `queue`, `prefill`, `decode`, `recovery`. Times are Unix nanoseconds.

    Nothing is recorded any more once the span has ended: a stream may go on without its client.
    """

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._context = set_span_in_context(span)
        self._generating: Generating | None = None
        self._has_failed = False

    def follow(self, generating: Generating) -> None:
        """Have `generating` say how it went when the request ends."""
        self._generating = generating

    def set(self, attributes: Mapping[str, AttributeValue]) -> None:
        """Add attributes to the request's span."""
        if self._span.is_recording():
            self._span.set_attributes(attributes)

    def add_child(self, name: str, begin: int, end: int, attributes: Mapping[str, AttributeValue]) -> None:
        """Record a part of the request."""
        if not self._span.is_recording():
            return
        child = self._tracer.start_span(name, self._context, attributes=attributes, start_time=begin)
        child.end(max(begin, end))

    def fail(self, error: APIError) -> None:
        """Record what ends the request."""
        if not self._span.is_recording():
            return
        self._has_failed = True
        self._span.set_attribute("error.type", error.code or error.type)
        if error.status >= SERVER_ERROR:
            self._span.set_status(Status(StatusCode.ERROR, error.message))

    def end(self, status: int, *, is_complete: bool) -> None:
        """End the span: the answer had an HTTP status, 0 if none, and was sent to its end or not."""
        if self._generating is not None:
            self._generating.note_end()
        if status:
            self._span.set_attribute("http.response.status_code", status)
        if status >= SERVER_ERROR and not self._has_failed:  # else more is known of it
            self._span.set_status(StatusCode.ERROR)
            self._span.set_attribute("error.type", str(status))
        if status == CLIENT_CLOSED_REQUEST or not is_complete:
            self._span.add_event("client disconnected")
        self._span.end()


TRACE: ContextVar[RequestTrace | None] = ContextVar("trace", default=None)  # None where nothing is recorded


def now() -> int:
    """Return the time."""
    return time.time_ns()


def at(perf_counter: float) -> int:
    """Return the time that was at a reading of `time.perf_counter`."""
    return time.time_ns() - int((time.perf_counter() - perf_counter) * 1e9)
