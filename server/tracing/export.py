"""Spans on their way to a collector, in batches, by a thread that nothing waits for."""

import asyncio
import logging
import time

from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from starlette.types import ASGIApp

from server.admission import AdmissionQueue
from server.generation import Generation, GenerationPlan
from server.text.token_bytes import TokenBytes
from server.threads import in_daemon_thread
from server.tracing.base import Traces
from server.tracing.generation import TracedGeneration
from server.tracing.middleware import Tracing
from server.tracing.request import TRACE

SECONDS_BETWEEN_LINES = 60.0  # of the log, about what cannot be exported
SHUTDOWN_SECONDS = 3.0  # for what has not been exported yet
# Their warnings are of headers that a client has sent, and repeat them: W3C has what is malformed ignored.
HEADER_LOGGERS = ("opentelemetry.trace.span", "opentelemetry.trace.propagation.tracecontext")


class ExportedTraces(Traces):
    """Makes the spans of a service, and exports them over OTLP/HTTP.

    OpenTelemetry's own variables are heeded: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER (by
    default what the client's `traceparent` says, else every request), OTEL_EXPORTER_OTLP_HEADERS, OTEL_BSP_*, ….
    """

    def __init__(self, endpoint: str, *, model: str, version: str) -> None:
        """Begin to export to the URL `endpoint` what requests to `model` do."""
        named = {"service.name": "ryzanstein", "service.version": version}
        resource = Resource.create({**named, **OTELResourceDetector().detect().attributes})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(trace_exporter.OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("ryzanstein", version)
        self._model = model
        self._seldom = SeldomFilter(SECONDS_BETWEEN_LINES)
        logging.getLogger(trace_exporter.__name__).addFilter(self._seldom)
        for name in HEADER_LOGGERS:
            logging.getLogger(name).addFilter(_is_error)

    def wrap(self, app: ASGIApp) -> ASGIApp:
        """See `Traces`."""
        return Tracing(app, self._tracer, self._model)

    def new_generation(self, queue: AdmissionQueue, token_bytes: TokenBytes, plan: GenerationPlan) -> Generation:
        """See `Traces`."""
        trace = TRACE.get()
        if trace is None:
            return Generation(queue, token_bytes, plan)
        return TracedGeneration(queue, token_bytes, plan, trace)

    async def close(self) -> None:
        """See `Traces`. What is not taken within `SHUTDOWN_SECONDS` is lost."""
        closing = asyncio.ensure_future(in_daemon_thread(self._provider.shutdown))
        await asyncio.wait((closing,), timeout=SHUTDOWN_SECONDS)
        logging.getLogger(trace_exporter.__name__).removeFilter(self._seldom)
        for name in HEADER_LOGGERS:
            logging.getLogger(name).removeFilter(_is_error)


class SeldomFilter(logging.Filter):
    """Lets a record pass when none has for a while: a collector that is away is told of once a minute."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self._passed_at = -seconds

    def filter(self, _: logging.LogRecord) -> bool:
        """Return whether it is time."""
        now = time.monotonic()
        if now - self._passed_at < self._seconds:
            return False
        self._passed_at = now
        return True


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
