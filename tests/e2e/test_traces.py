"""`--otlp-traces-endpoint`: what a real service exports of its requests, to a real OTLP/HTTP receiver."""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise
from typing import Any

import httpx
import psutil
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.otlp_receiver import OTLPReceiver, attributes, is_request
from tests.service_process import REQUEST_SECONDS, ServiceProcess, wait_until

PARENT = "00f067aa0ba902b7"
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "100"}  # milliseconds between two batches
SHUTDOWN_SECONDS = 60.0  # generous: 3 for the exporter, and the rest of the end
numbers = count(1)


@pytest.fixture(scope="module")
def receiver() -> Iterator[OTLPReceiver]:
    with OTLPReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def service(receiver: OTLPReceiver) -> Iterator[ServiceProcess]:
    """Two ranks, few places in the engine, and a log for machines."""
    options = ("--tensor-parallel-size", "2", "--max-num-seqs", "1", "--log-format", "json")
    environment = {**SOON, "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test"}
    environment["OTEL_EXPORTER_OTLP_HEADERS"] = "x-tenant=mine"
    with ServiceProcess(*options, "--otlp-traces-endpoint", receiver.url, environment=environment) as service:
        yield service


def new_trace(*, sampled: bool = True) -> tuple[str, dict[str, str]]:
    """Return the id of a trace that nobody has used, and the headers of a request that belongs to it."""
    trace_id = f"{next(numbers):032x}"
    return trace_id, {"traceparent": f"00-{trace_id}-{PARENT}-{sampled:02x}", "tracestate": "vendor=value"}


def ask(service: ServiceProcess, path: str, headers: dict[str, str], **body: Any) -> httpx.Response:
    return httpx.post(f"{service.url}/v1/{path}", json=body, headers=headers, timeout=REQUEST_SECONDS)


def written(method: str, path: str, headers: dict[str, str]) -> bytes:
    """Return a request as it is on the wire."""
    body = json.dumps({"prompt": "x", "max_tokens": 2, "ignore_eos": True}) if method == "POST" else ""
    fields = {"host": "here", "content-type": "application/json", "content-length": str(len(body)), **headers}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", body]).encode()


def assert_parts_follow(spans: dict[str, Span], *names: str) -> None:
    """Check that the named parts lie in their request, and begin where the one before ends."""
    request = spans["request"]
    parts = [spans[name] for name in names]
    assert [part.parent_span_id for part in parts] == [request.span_id] * len(parts)
    assert request.start_time_unix_nano <= parts[0].start_time_unix_nano
    assert parts[-1].end_time_unix_nano <= request.end_time_unix_nano
    for before, after in pairwise(parts):
        assert before.start_time_unix_nano <= before.end_time_unix_nano == after.start_time_unix_nano


def test_a_completion_is_a_span_of_the_clients_trace_with_its_parts(
    service: ServiceProcess, receiver: OTLPReceiver
) -> None:
    trace_id, headers = new_trace()
    body = {"prompt": "import ", "max_tokens": 5, "temperature": 0.5, "top_k": 7, "n": 2}
    answer = ask(service, "completions?key=secret", headers, **body, top_p=0.5, ignore_eos=True).json()
    spans = receiver.trace(trace_id)
    request = spans["request"]
    assert (request.parent_span_id.hex(), request.trace_state) == (PARENT, "vendor=value")
    assert request.name == "text_completion ryzanstein-embedded"
    assert request.status.code == Status.STATUS_CODE_UNSET
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "url.path": "/v1/completions",
        "url.scheme": "http",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "ryzanstein",
        "gen_ai.request.model": "ryzanstein-embedded",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stream": False,
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 10,
        "gen_ai.usage.cache_read.input_tokens": 0,
    }
    assert set(spans) == {"request", "queue", "prefill", "decode"}
    assert_parts_follow(spans, "queue", "prefill", "decode")
    assert attributes(spans["decode"]) == {"gen_ai.usage.output_tokens": 10}


def test_a_stream_has_the_time_to_its_first_token(service: ServiceProcess, receiver: OTLPReceiver) -> None:
    trace_id, headers = new_trace()
    body = {"messages": [{"role": "user", "content": "private words"}], "max_tokens": 3, "stream": True}
    assert ask(service, "chat/completions", headers, **body, ignore_eos=True).text.endswith("data: [DONE]\n\n")
    spans = receiver.trace(trace_id)
    assert_parts_follow(spans, "queue", "prefill", "decode")
    found = attributes(spans["request"])
    assert (spans["request"].name, found["gen_ai.request.stream"]) == ("chat ryzanstein-embedded", True)
    seconds = (spans["prefill"].end_time_unix_nano - spans["queue"].start_time_unix_nano) / 1e9
    assert found["gen_ai.response.time_to_first_chunk"] == pytest.approx(seconds)
    assert all(b"private" not in span.SerializeToString() for span in receiver.spans)
    assert not spans["request"].events


def test_the_exporter_says_whose_spans_they_are(service: ServiceProcess, receiver: OTLPReceiver) -> None:
    trace_id, headers = new_trace()
    ask(service, "completions", headers, prompt="x", max_tokens=1)
    receiver.trace(trace_id)
    assert receiver.resource["service.name"] == "ryzanstein"
    assert receiver.resource["deployment.environment"] == "test"
    assert receiver.headers["x-tenant"] == "mine"


def test_the_exporters_headers_stay_in_the_server(service: ServiceProcess) -> None:
    environments = {each.pid: each.environ() for each in service.descendants()}
    assert len(environments) == 4  # orchestrator, what ranks are forked from, and ranks
    assert all("OTEL_EXPORTER_OTLP_HEADERS" not in environment for environment in environments.values())
    assert psutil.Process(service.process.pid).environ()["OTEL_EXPORTER_OTLP_HEADERS"]  # so that it would be found


def test_a_client_that_does_not_sample_is_not_traced(service: ServiceProcess, receiver: OTLPReceiver) -> None:
    unsampled, headers = new_trace(sampled=False)
    assert ask(service, "completions", headers, prompt="x", max_tokens=1).status_code == 200
    sampled, headers = new_trace()
    ask(service, "completions", headers, prompt="x", max_tokens=1)
    receiver.trace(sampled)
    assert not [span for span in receiver.spans if span.trace_id.hex() == unsampled]


def test_a_request_without_a_trace_begins_one_which_its_log_names(
    service: ServiceProcess, receiver: OTLPReceiver
) -> None:
    ask(service, "completions", {"x-request-id": "mine-8", "traceparent": "nonsense"}, prompt="x", max_tokens=1)
    wait_until(lambda: "mine-8" in service.stderr, 60)
    records = [json.loads(line) for line in service.stderr.splitlines()]
    (trace_id,) = [record["trace_id"] for record in records if record.get("request_id") == "mine-8"]
    assert receiver.trace(trace_id)["request"].parent_span_id == b""


def test_pipelined_requests_are_no_part_of_the_trace_before_them(
    service: ServiceProcess, receiver: OTLPReceiver
) -> None:
    (trace_id, headers), (_, unsampled), (last_id, last) = new_trace(), new_trace(sampled=False), new_trace()
    pipeline = [
        written("POST", "/v1/completions", {**headers, "x-request-id": "piped-1"}),
        written("POST", "/v1/completions", {**unsampled, "x-request-id": "piped-2"}),
        written("GET", "/v1/models", {"x-request-id": "piped-3"}),
        written("POST", "/v1/completions", {**last, "connection": "close"}),
    ]
    with socket.create_connection(("127.0.0.1", httpx.URL(service.url).port or 80), REQUEST_SECONDS) as connection:
        connection.sendall(b"".join(pipeline))
        assert b"".join(iter(lambda: connection.recv(65536), b"")).count(b"HTTP/1.1 200") == len(pipeline)
    receiver.trace(last_id)
    names = [span.name for span in receiver.spans if span.trace_id.hex() == trace_id]
    assert sorted(names) == ["decode", "prefill", "queue", "text_completion ryzanstein-embedded"]
    wait_until(lambda: "piped-3" in service.stderr, 60)
    records = [json.loads(line) for line in service.stderr.splitlines()]
    traced = {record["request_id"]: record.get("trace_id") for record in records if "request_id" in record}
    assert traced["piped-1"] == trace_id
    assert traced["piped-3"] is None


def test_headers_that_are_no_trace_are_not_repeated_in_the_log(service: ServiceProcess) -> None:
    long = {"traceparent": "a" * 600, "tracestate": f"{'x' * 600}=1", "x-request-id": "mine-9"}
    bad = {**new_trace()[1], "tracestate": f"{'x' * 600}=1"}
    assert [ask(service, "completions", headers, prompt="x", max_tokens=1).status_code for headers in (bad, long)] == [
        200,
        200,
    ]
    wait_until(lambda: "mine-9" in service.stderr, 60)
    assert "opentelemetry" not in service.stderr
    assert "xxx" not in service.stderr


def test_headers_that_come_in_several_fields_are_one(service: ServiceProcess, receiver: OTLPReceiver) -> None:
    """As HTTP has it: the states are a list, and what is two parents is none."""
    (trace_id, headers), (twice, again) = new_trace(), new_trace()
    states = [("traceparent", headers["traceparent"]), ("tracestate", "a=1"), ("tracestate", "b=2,c=3")]
    parents = [("traceparent", again["traceparent"])] * 2
    url, body = f"{service.url}/v1/completions", {"prompt": "x", "max_tokens": 1}
    for fields in (parents, states):
        assert httpx.post(url, json=body, headers=fields, timeout=REQUEST_SECONDS).status_code == 200
    assert receiver.trace(trace_id)["request"].trace_state == "a=1,b=2,c=3"
    assert not [span for span in receiver.spans if span.trace_id.hex() == twice]


def test_paths_that_generate_nothing_have_no_spans(service: ServiceProcess, receiver: OTLPReceiver) -> None:
    other, headers = new_trace()
    assert httpx.get(f"{service.url}/v1/models", headers=headers).status_code == 200
    trace_id, headers = new_trace()
    ask(service, "completions", headers, prompt="x", max_tokens=1)
    receiver.trace(trace_id)
    assert not [span for span in receiver.spans if span.trace_id.hex() == other]


def test_a_refused_request_is_a_span_without_parts(service: ServiceProcess, receiver: OTLPReceiver) -> None:
    trace_id, headers = new_trace()
    assert ask(service, "completions", headers, prompt=7).status_code == 400
    spans = receiver.trace(trace_id)
    assert set(spans) == {"request"}
    assert attributes(spans["request"])["http.response.status_code"] == 400
    assert spans["request"].status.code == Status.STATUS_CODE_UNSET  # as the conventions want it: a client's mistake


@pytest.mark.parametrize("stream", [False, True])
def test_what_ends_too_late_is_an_error(service: ServiceProcess, receiver: OTLPReceiver, stream: bool) -> None:
    trace_id, headers = new_trace()
    ask(service, "completions", headers, prompt="x", max_tokens=900, ignore_eos=True, timeout=0.05, stream=stream)
    request = receiver.trace(trace_id)["request"]
    assert request.status.code == Status.STATUS_CODE_ERROR
    assert request.status.message == "The request was not finished within 0.05 seconds."
    assert attributes(request)["error.type"] == "timeout"
    assert not request.events


def test_a_client_that_leaves_ends_its_span(service: ServiceProcess, receiver: OTLPReceiver) -> None:
    trace_id, headers = new_trace()
    body = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}
    url = f"{service.url}/v1/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=REQUEST_SECONDS) as answer:
        next(answer.iter_lines())
    spans = receiver.trace(trace_id)
    assert [event.name for event in spans["request"].events] == ["client disconnected"]
    assert 0 < attributes(spans["request"])["gen_ai.usage.output_tokens"] < 900
    assert_parts_follow(spans, "queue", "prefill", "decode")


def test_what_waits_for_a_place_is_in_the_queue_for_so_long(service: ServiceProcess, receiver: OTLPReceiver) -> None:
    traces = [new_trace() for _ in range(3)]
    body = {"prompt": "x", "max_tokens": 150, "ignore_eos": True}
    with ThreadPoolExecutor(3) as pool:
        with service.held():
            answers = [pool.submit(ask, service, "completions", headers, **body) for _, headers in traces]
            # The third waits in the server, behind one that waits in the engine.
            wait_until(lambda: service.metric("ryzanstein_queued_requests") == 1, 60)
        assert {answer.result().status_code for answer in answers} == {200}
    found = [receiver.trace(trace_id) for trace_id, _ in traces]
    decodes = sorted((each["decode"].start_time_unix_nano, each["decode"].end_time_unix_nano) for each in found)
    queues = sorted(each["queue"].end_time_unix_nano - each["queue"].start_time_unix_nano for each in found)
    begin, end = decodes[1]
    assert queues[-1] > end - begin  # one runs at a time; all came before the first ran
    for spans in found:
        assert_parts_follow(spans, "queue", "prefill", "decode")


def test_a_killed_rank_is_a_recovery_of_the_requests_that_it_held_up(
    service: ServiceProcess, receiver: OTLPReceiver
) -> None:
    trace_id, headers = new_trace()
    body = {"prompt": "x", "max_tokens": 600, "ignore_eos": True, "stream": True}
    url = f"{service.url}/v1/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=REQUEST_SECONDS) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(service.rank_pids()[1], signal.SIGKILL)
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    spans = receiver.trace(trace_id)
    recovery = spans["recovery"]
    found = attributes(recovery)
    assert "SIGKILL" in found["ryzanstein.recovery.cause"]
    assert found["ryzanstein.recovery.kind"] == "died"
    assert found["ryzanstein.recovery.load_seconds"] > 0
    assert recovery.parent_span_id == spans["request"].span_id
    decode = spans["decode"]
    assert decode.start_time_unix_nano <= recovery.start_time_unix_nano
    assert recovery.end_time_unix_nano <= decode.end_time_unix_nano
    assert attributes(spans["request"])["gen_ai.usage.output_tokens"] == 600


@pytest.mark.slow
def test_a_collector_that_is_away_is_told_of_once_and_harms_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:  # nobody listens there when it is closed
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1/traces"
    with ServiceProcess("--otlp-traces-endpoint", url, environment=SOON) as service:
        for _ in range(2):
            service.complete(prompt="x", max_tokens=2)
            wait_until(lambda: "spans" in service.stderr, 60)
        service.complete(prompt="x", max_tokens=2)
        begin = time.monotonic()
    assert time.monotonic() - begin < SHUTDOWN_SECONDS
    assert service.process.returncode == 0
    assert len([line for line in service.stderr.splitlines() if "spans" in line]) == 1
    assert "Traceback" not in service.stderr


@pytest.mark.parametrize("answers", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_end_exports_what_is_left_unless_the_collector_hangs(answers: bool) -> None:
    with OTLPReceiver() as receiver:
        if not answers:
            receiver.release.clear()
        environment = {"OTEL_BSP_SCHEDULE_DELAY": "600000"}  # no batch before the end
        with ServiceProcess("--otlp-traces-endpoint", receiver.url, environment=environment) as service:
            service.complete(prompt="x", max_tokens=2)
            assert receiver.num_exports == 0
            begin = time.monotonic()
        assert time.monotonic() - begin < SHUTDOWN_SECONDS
        assert service.process.returncode == 0
        assert [span.name for span in receiver.spans if is_request(span)] == ["text_completion ryzanstein-embedded"]
