"""A span for each request that generates, as part of the trace that the client says it belongs to."""

from collections.abc import Iterator

from opentelemetry.trace import Span, SpanKind, Tracer, format_trace_id
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.logs import TRACE_ID
from server.tracing.request import TRACE, RequestTrace

OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}
TRACE_HEADERS = (b"traceparent", b"tracestate")


class Tracing:
    """ASGI middleware: a request's span lasts from its header to the end of its answer.

    It carries OpenTelemetry's attributes of HTTP servers and generative AI; never a prompt, a text or a key.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer, model: str) -> None:
        self._app = app
        self._tracer = tracer
        self._model = model
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        operation = OPERATIONS.get(scope["path"].removeprefix(scope["root_path"]))
        if operation is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        span = self._start(scope, operation)
        TRACE_ID.set(format_trace_id(span.get_span_context().trace_id))  # not reset, like the request's id
        if not span.is_recording():
            await self._app(scope, receive, send)
            return
        trace = RequestTrace(self._tracer, span)
        TRACE.set(trace)
        status, is_complete = 0, False

        async def send_noting(message: Message) -> None:
            nonlocal status, is_complete
            status = message.get("status", status)
            await send(message)
            is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._app(scope, receive, send_noting)
        finally:
            trace.end(status, is_complete=is_complete)

    def _start(self, scope: Scope, operation: str) -> Span:
        path = scope["path"].removeprefix(scope["root_path"])
        return self._tracer.start_span(
            f"{operation} {self._model}",
            self._propagator.extract(dict(_trace_headers(scope))),
            SpanKind.SERVER,
            {
                "http.request.method": scope["method"],
                "http.route": path,
                "url.path": scope["path"],
                "url.scheme": scope["scheme"],
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "ryzanstein",
                "gen_ai.request.model": self._model,
            },
        )


def _trace_headers(scope: Scope) -> Iterator[tuple[str, str]]:
    """Return each header's values as one, by commas, as HTTP has it (RFC 9110, section 5.3)."""
    for wanted in TRACE_HEADERS:
        if values := [value for name, value in scope["headers"] if name == wanted]:
            yield wanted.decode(), b",".join(values).decode("latin-1")
