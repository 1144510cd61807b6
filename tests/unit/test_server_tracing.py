"""Traces are an option: without it nothing is imported, and without the extra it is refused in one line."""

import logging
import subprocess
import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.config import ServerConfig
from server.errors import APIError
from server.tracing import extra
from server.tracing.export import SeldomFilter
from server.tracing.request import RequestTrace, now
from tests.service_process import ROOT


def test_without_the_option_nothing_of_the_sdk_is_imported() -> None:
    program = "import sys, server.cli, server.run\nprint([name for name in sys.modules if name.startswith(WHAT)])"
    program = program.replace("WHAT", repr(("opentelemetry.sdk", "opentelemetry.exporter", "google.protobuf")))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("missing", ["no_such_package", "no_such_package.below.it", "opentelemetry.no_such_module"])
def test_without_the_extra_the_option_is_refused(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extra.require_extra()  # it is here
    monkeypatch.setattr(extra, "MODULES", ("opentelemetry.sdk", missing))
    with pytest.raises(
        ValueError, match=r"^--otlp-traces-endpoint needs OpenTelemetry: pip install 'ryzanstein\[traces\]'$"
    ):
        extra.require_extra()


@pytest.mark.parametrize(
    "url", ["localhost:4317", "grpc://a:4317", "http://", "http://a b", "http://a:x/", "http://me:word@a/", ""]
)
def test_what_is_no_http_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="--otlp-traces-endpoint must be like http://localhost:4318/v1/traces"):
        ServerConfig(otlp_traces_endpoint=url)


@pytest.mark.parametrize("url", ["http://a", "https://a.b:4318/v1/traces", "http://[::1]:4318/v1/traces?x=y"])
def test_an_http_url_is_taken(url: str) -> None:
    assert ServerConfig(otlp_traces_endpoint=url).otlp_traces_endpoint == url


def test_a_request_whose_span_has_ended_adds_nothing_to_it(caplog: pytest.LogCaptureFixture) -> None:
    """A stream goes on without its client, who may come back; what becomes of it belongs to no span of theirs."""
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    trace = RequestTrace(tracer, tracer.start_span("request"))
    trace.add_child("queue", now(), now(), {})
    trace.end(200, is_complete=False)
    trace.fail(APIError("too late", status=504))
    trace.set({"late": True})
    trace.add_child("decode", now(), now(), {})
    queue, request = exporter.get_finished_spans()
    assert (queue.name, request.name) == ("queue", "request")
    assert dict(request.attributes or {}) == {"http.response.status_code": 200}
    assert request.status.is_unset
    assert not caplog.records


def test_a_filter_lets_one_record_pass_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("server.tracing.export.time.monotonic", lambda: now)
    record = logging.makeLogRecord({})
    seldom = SeldomFilter(60.0)
    assert [seldom.filter(record), seldom.filter(record)] == [True, False]
    now += 61
    assert [seldom.filter(record), seldom.filter(record)] == [True, False]
