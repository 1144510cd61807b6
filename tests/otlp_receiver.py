"""A collector of traces: a real HTTP server that decodes what exporters send."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.http_server import HTTPServer, PostHandler
from tests.service_process import wait_until


def attributes(span: Span) -> dict[str, Any]:
    """Return a span's attributes as Python values."""
    return {item.key: _value(item.value) for item in span.attributes}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    assert kind is not None
    found = getattr(value, kind)
    return [_value(item) for item in found.values] if kind == "array_value" else found


class OTLPReceiver(HTTPServer):
    """`with OTLPReceiver() as receiver:` takes OTLP/HTTP at `receiver.url`, and answers with `receiver.status`."""

    def __init__(self) -> None:
        self.status = 200
        self.spans: list[Span] = []
        self.resource: dict[str, Any] = {}
        self.headers: dict[str, str] = {}  # of the last export
        self.num_exports = 0
        self.release = threading.Event()  # an answer waits for it
        self.release.set()
        receiver = self

        class Handler(PostHandler):
            def take(self, body: bytes) -> int:
                receiver.headers = {name.lower(): value for name, value in self.headers.items()}
                receiver._take(body)
                receiver.release.wait(60)
                return receiver.status

        super().__init__(Handler, "/v1/traces")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release.set()
        super().__exit__(kind, error, traceback)

    def _take(self, body: bytes) -> None:
        self.num_exports += 1
        for spans in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resource = {item.key: _value(item.value) for item in _items(spans.resource.attributes)}
            for scope in spans.scope_spans:
                self.spans.extend(scope.spans)

    def trace(self, trace_id: str, is_enough: Callable[[list[Span]], bool] = bool) -> dict[str, Span]:
        """Wait until there is a root of a trace, and return its spans by their names, a root's being "request"."""

        def spans() -> list[Span]:
            return [span for span in self.spans if span.trace_id.hex() == trace_id]

        wait_until(lambda: any(map(is_request, spans())) and is_enough(spans()), 60)
        return {"request" if is_request(span) else span.name: span for span in spans()}


def is_request(span: Span) -> bool:
    """Return whether a span is that of a request, not of a part of it."""
    return span.kind == Span.SPAN_KIND_SERVER


def _items(attributes: Any) -> list[KeyValue]:
    return list(attributes)
