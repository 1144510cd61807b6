"""Health, readiness, metrics, documentation, and the HTTP below it all."""

import inspect
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute
from prometheus_client.parser import text_string_to_metric_families

from engine.protocol.messages import (
    GroupState,
    GroupStatus,
    HistogramDelta,
    RankStats,
    Recovery,
    SchedulerStats,
    StatsReport,
)
from engine.protocol.stats import BATCH_SIZE_BUCKETS, STEP_BUCKETS, STEP_TOKENS_BUCKETS, TIME_BUCKETS
from server.app import ROUTERS
from server.text import chat_template
from server.text.chat_template import ChatTemplate
from tests.metric_samples import sample_lines
from tests.unit.server_support import (
    CHAT,
    COMPLETIONS,
    MAX_MODEL_LEN,
    MESSAGES,
    RunningServer,
    post,
    raw_exchange,
    ready_status,
    running_server,
    wait_until,
    write_model,
)

LATENCY = "e2e_request_latency_seconds"


def test_readiness_shows_the_ranks(idle_server: RunningServer) -> None:
    response = httpx.get(f"{idle_server.url}/ready")
    assert response.status_code == 200
    assert response.json() == {
        "state": "READY",
        "epoch": 1,
        "ranks": [{"rank": 0, "pid": 4711, "host": "here", "device": "cpu"}],
        "error": None,
    }


def test_readiness_shows_why_the_engine_failed(model: Path) -> None:
    with running_server(model, ready=False) as server:
        status = GroupStatus(epoch=1, state=GroupState.FAILED, error="rank 0 was killed by SIGKILL")
        server.call(lambda: server.client.set_status(status))
        response = httpx.get(f"{server.url}/ready")
        assert response.status_code == 503
        assert response.json() == {"state": "FAILED", "epoch": 1, "ranks": [], "error": "rank 0 was killed by SIGKILL"}
        assert post(server, COMPLETIONS, {"prompt": "x"}).status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_loading_shows_in_readiness_and_in_a_gauge(model: Path) -> None:
    gauge = "weights_loaded_ratio"
    with running_server(model, ready=False) as server:

        def hear(status: GroupStatus) -> None:
            server.call(lambda: server.client.set_status(status))

        assert metric(server, gauge) == 0
        hear(GroupStatus(epoch=1, state=GroupState.STARTING))
        assert "total_bytes" not in httpx.get(f"{server.url}/ready").json()
        hear(GroupStatus(epoch=1, state=GroupState.STARTING, loaded_bytes=300, total_bytes=400))
        readiness = httpx.get(f"{server.url}/ready")
        assert readiness.status_code == 503
        assert readiness.json() == {
            "state": "STARTING",
            "epoch": 1,
            "ranks": [],
            "error": None,
            "loaded_bytes": 300,
            "total_bytes": 400,
        }
        assert metric(server, gauge) == 0.75
        hear(GroupStatus(epoch=1, state=GroupState.FAILED, error="no more"))
        assert metric(server, gauge) == 0.75
        hear(GroupStatus(epoch=2, state=GroupState.STARTING))
        assert metric(server, gauge) == 0


def test_a_recovery_shows_in_readiness_while_it_lasts_and_afterwards(server: RunningServer) -> None:
    recovery = Recovery("rank 1 was killed by SIGKILL", 1700000000.5, ["a"], {"kill": 0.25}, "died")
    place = server.client.status.engine_endpoint
    last = {"cause": recovery.cause, "kind": "died", "noticed_at": 1700000000.5, "seconds": {"kill": 0.25}}

    def lose() -> None:
        server.client.lose(
            GroupStatus(2, GroupState.RECOVERING, loaded_bytes=3, total_bytes=4, recovery=recovery),
        )

    assert "last_recovery" not in httpx.get(f"{server.url}/ready").json()
    server.call(lose)
    readiness = httpx.get(f"{server.url}/ready")
    assert readiness.status_code == 503
    assert readiness.json() == {
        "state": "RECOVERING",
        "epoch": 2,
        "ranks": [],
        "error": None,
        "loaded_bytes": 3,
        "total_bytes": 4,
        "last_recovery": last,
    }
    assert metric(server, 'engine_state{state="RECOVERING"}') == 1
    assert metric(server, "engine_ready") == 0
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["max_model_len"] == MAX_MODEL_LEN
    server.call(lambda: server.client.connect(ready_status(place)))
    readiness = httpx.get(f"{server.url}/ready")
    assert readiness.status_code == 200
    assert readiness.json()["last_recovery"] == last


def test_all_is_loaded_when_the_engine_is_ready(idle_server: RunningServer) -> None:
    assert metric(idle_server, "weights_loaded_ratio") == 1


@pytest.mark.parametrize(("is_ready", "status"), [(True, 200), (False, 503)])
def test_health_and_readiness_answer_head_without_a_body(model: Path, is_ready: bool, status: int) -> None:
    with running_server(model, ready=is_ready) as server:
        health, ready = httpx.head(f"{server.url}/health"), httpx.head(f"{server.url}/ready")
    assert (health.status_code, ready.status_code) == (200, status)
    assert health.content == ready.content == b""


def test_a_chunked_body_is_put_together(server: RunningServer) -> None:
    body = json.dumps({"prompt": [5, 6], "max_tokens": 3}).encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:7], body[7:8], body[8:]))
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    answer = raw_exchange(server, head.encode() + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert server.engine.requests[0].prompt_token_ids == [5, 6]


def test_pipelined_requests_are_answered_in_order(server: RunningServer) -> None:
    def request(content: bytes, connection: bytes) -> bytes:
        return (
            b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: %s\r\n"
            b"content-length: %d\r\n\r\n%s" % (COMPLETIONS.encode(), connection, len(content), content)
        )

    server.engine.script = lambda sent: "abc"[sent.prompt_token_ids[0] - 5]
    bodies = [json.dumps({"prompt": [token], "stream": token == 6}).encode() for token in (5, 6, 7)]
    pipeline = b"".join(map(request, bodies, (b"keep-alive", b"keep-alive", b"close")))
    answer = raw_exchange(server, pipeline)
    assert answer.count(b"HTTP/1.1 200") == 3
    assert re.findall(rb'"text":"([abc])"', answer) == [b"a", b"b", b"c"]


def test_version_docs_and_schema_are_served(idle_server: RunningServer) -> None:
    assert "version" in httpx.get(f"{idle_server.url}/version").json()
    page = httpx.get(f"{idle_server.url}/docs").text
    assets = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(assets) == 3
    for asset in assets:  # all from here: a browser may have no way to anywhere else
        assert httpx.get(idle_server.url + asset).status_code == 200
    schema = httpx.get(f"{idle_server.url}/openapi.json").json()
    operation = schema["paths"][CHAT]["post"]
    assert {"200", "400", "404", "413", "429", "500", "503", "504"} == set(operation["responses"])
    assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    prompt = schema["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"]
    assert [item["type"] for item in prompt["anyOf"]] == ["string", "array", "array", "array"]


def test_operations_have_readable_summaries(idle_server: RunningServer) -> None:
    paths = httpx.get(f"{idle_server.url}/openapi.json").json()["paths"]
    summaries = {path: operation["summary"] for path, methods in paths.items() for operation in methods.values()}
    assert summaries == {
        COMPLETIONS: "Continue a text",
        CHAT: "Answer a conversation",
        "/v1/streams/{stream_id}": "Go on with a stream",
        "/tokenize": "Text to token ids",
        "/detokenize": "Token ids to text",
        "/v1/models": "List the models",
        "/v1/models/{name}": "Describe a model",
        "/health": "Is the process alive?",
        "/ready": "Are requests taken?",
        "/version": "Version of the service",
        "/metrics": "Metrics for Prometheus",
    }


def test_request_ids_come_back_or_are_made(idle_server: RunningServer) -> None:
    url = f"{idle_server.url}/health"
    assert httpx.get(url, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = httpx.get(url, headers={"x-request-id": "not one"}).headers["x-request-id"]
    assert len(made) == 32


def metric(server: RunningServer, name: str) -> float | None:
    for line in sample_lines(httpx.get(f"{server.url}/metrics").text):
        if line.startswith(f"ryzanstein_{name} "):
            return float(line.rsplit(" ", 1)[1])
    return None


def test_latencies_and_tokens_are_counted(server: RunningServer) -> None:
    server.engine.script = lambda _: "abc"
    post(server, COMPLETIONS, {"prompt": [5, 6, 7], "n": 2, "ignore_eos": True, "max_tokens": 5})
    server.engine.holds_after = 1  # what came between the stop string and the abort would count too
    post(server, COMPLETIONS, {"prompt": [5], "stop": "a"})
    assert metric(server, "prompt_tokens_total") == 4
    assert metric(server, 'request_success_total{finished_reason="length"}') == 2
    assert metric(server, 'request_success_total{finished_reason="stop"}') == 1
    assert metric(server, "time_to_first_token_seconds_count") == 3
    assert metric(server, "inter_token_latency_seconds_count") == 8
    assert metric(server, "generation_tokens_total") == 11
    assert metric(server, "e2e_request_latency_seconds_count") == 3
    assert metric(server, "request_queue_time_seconds_sum") == pytest.approx(0.003)
    for name in ("request_prefill_time_seconds", "request_decode_time_seconds", "request_generation_tokens"):
        assert metric(server, f"{name}_count") == 3
    assert metric(server, "request_time_per_output_token_seconds_count") == 2  # the third ended with its first token
    assert metric(server, "request_generation_tokens_sum") == 11
    assert metric(server, 'request_prompt_tokens_bucket{le="2.0"}') == 1
    assert metric(server, "request_prompt_tokens_sum") == 4


def test_ends_are_counted_from_zero(idle_server: RunningServer) -> None:
    for reason in ("stop", "length", "abort", "error"):
        assert metric(idle_server, f'request_success_total{{finished_reason="{reason}"}}') == 0


def test_short_waits_in_the_queue_are_told_apart(server: RunningServer) -> None:
    post(server, COMPLETIONS, {"prompt": [5]})  # waits 1 ms
    assert metric(server, 'request_queue_time_seconds_bucket{le="0.0005"}') == 0
    assert metric(server, 'request_queue_time_seconds_bucket{le="0.001"}') == 1


def test_to_readers_of_vllms_names_the_queue_is_the_servers_and_the_engines_together(tmp_path: Path) -> None:
    """As in vLLM, whose queue is one: all of the time before the first step."""
    with running_server(write_model(tmp_path), max_num_seqs=1, vllm_metric_names=True) as server:
        server.engine.is_paused = True
        with ThreadPoolExecutor(4) as pool:  # two in the engine, which tells of 1 ms for each, and two that wait here
            answers = [pool.submit(post, server, COMPLETIONS, {"prompt": [5]}) for _ in range(4)]
            assert wait_until(lambda: metric(server, "queued_requests") == 2)
            server.engine.is_paused = False
            assert all(answer.result().is_success for answer in answers)
        page = httpx.get(f"{server.url}/metrics").text
        samples = [each for family in text_string_to_metric_families(page) for each in family.samples]
        sums = {each.name: each.value for each in samples if each.name.endswith("_time_seconds_sum")}
        queued, admitted = (sums[f"ryzanstein_request_{name}_time_seconds_sum"] for name in ("queue", "admission"))
        waited = sums["vllm:request_queue_time_seconds_sum"]
    assert queued == pytest.approx(0.004)
    assert waited >= admitted + queued > queued


def test_whole_latencies_are_those_of_sequences_that_came_to_their_end(server: RunningServer) -> None:
    post(server, COMPLETIONS, {"prompt": [5], "max_tokens": 2, "ignore_eos": True})
    post(server, COMPLETIONS, {"prompt": [5], "stop": "choice"})
    assert metric(server, "e2e_request_latency_seconds_count") == 2
    server.engine.fails_after = 1
    post(server, COMPLETIONS, {"prompt": [5]})
    assert metric(server, 'request_success_total{finished_reason="error"}') == 1
    assert metric(server, "e2e_request_latency_seconds_count") == 2


def test_latencies_include_what_comes_before_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_SECONDS", 60.0)
    model = write_model(tmp_path)
    loops = "{% for _ in range(30000) %}{% for _ in range(30) %}{% endfor %}{% endfor %}hello"
    (model / "chat_template.jinja").write_text(loops)
    with running_server(model) as server:
        begin = time.thread_time()
        ChatTemplate(loops, {}).render([])
        slow = time.thread_time() - begin
        post(server, CHAT, {"messages": MESSAGES}).raise_for_status()
        first, whole = (metric(server, f"{name}_sum") for name in ("time_to_first_token_seconds", LATENCY))
    assert slow > 0.05
    assert first is not None
    assert whole is not None
    assert whole >= first > slow / 3


def test_prometheus_can_read_the_metrics(server: RunningServer) -> None:
    post(server, COMPLETIONS, {"prompt": [5, 6], "max_tokens": 4, "ignore_eos": True})
    response = httpx.get(f"{server.url}/metrics", headers={"accept": "text/plain"})
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert families["ryzanstein_generation_tokens"].type == "counter"
    assert families["ryzanstein_num_requests_running"].type == "gauge"
    latency = families[f"ryzanstein_{LATENCY}"]
    assert latency.type == "histogram"
    assert "before its text is tokenized" in latency.documentation
    assert [sample.value for sample in latency.samples if sample.name.endswith("_count")] == [1]
    for family in families.values():
        assert family.name.startswith(("ryzanstein_", "process_"))
        assert family.documentation
        assert family.type != "unknown"


def test_the_engines_statistics_are_added_up(server: RunningServer) -> None:
    counts = [1, *[0] * (len(TIME_BUCKETS) - 1), 2]
    stats = RankStats(
        1,
        1,
        {"all_reduce": HistogramDelta(counts, 25.0)},
        {"resident": 1000},
        {"all_reduce": HistogramDelta(counts, 5.0)},
        backend="gloo",
        world_size=4,
        collective_bytes={"all_reduce": 1000},
        phases={"compute": HistogramDelta([0] * len(STEP_BUCKETS) + [1], 3.0)},
        weights_resident_ratio=0.5,
    )
    scheduler = SchedulerStats(
        num_running=3,
        num_waiting=2,
        num_kv_blocks=64,
        num_free_kv_blocks=16,
        preemptions=1,
        steps=10,
        integrity_checks=1,
        prefix_cache_queries=30,
        prefix_cache_hits=20,
        batch_sizes=HistogramDelta([0] * len(BATCH_SIZE_BUCKETS) + [1], 10.0),
        step_tokens=HistogramDelta([0] * len(STEP_TOKENS_BUCKETS) + [1], 100.0),
    )
    skew = HistogramDelta([0] * len(STEP_BUCKETS) + [1], 2.0)
    for _ in range(2):
        server.send(StatsReport(1, scheduler, [stats], skew))
    assert wait_until(lambda: metric(server, "engine_steps_total") == 20)
    backend, labels = 'backend="gloo"', 'operation="all_reduce",rank="1"'
    assert metric(server, f"collective_seconds_count{{{backend},{labels}}}") == 6
    assert metric(server, f"collective_seconds_sum{{{backend},{labels}}}") == 50
    assert metric(server, f'collective_seconds_bucket{{{backend},le="5e-06",{labels}}}') == 2
    assert metric(server, f'collective_seconds_bucket{{{backend},le="10.0",{labels}}}') == 2
    assert metric(server, f"collective_waiting_seconds_count{{{backend},{labels}}}") == 6
    assert metric(server, f"collective_waiting_seconds_sum{{{backend},{labels}}}") == 10
    assert metric(server, f"collective_bytes_total{{{backend},{labels}}}") == 2000
    # Of 25 s it waited 5: 1000 bytes in 20 s, and with 4 ranks each byte of an all-reduce counts 1.5 times.
    assert metric(server, f"collective_bus_bandwidth_bytes_per_second{{{backend},{labels}}}") == 75
    assert metric(server, 'step_phase_seconds_sum{phase="compute",rank="1"}') == 6
    assert metric(server, "rank_skew_seconds_sum") == 4
    assert (metric(server, "step_sequences_sum"), metric(server, "step_tokens_sum")) == (20, 200)
    assert metric(server, 'rank_weights_resident_ratio{rank="1"}') == 0.5
    assert metric(server, 'rank_memory_bytes{kind="resident",rank="1"}') == 1000
    assert metric(server, "num_preemptions_total") == 2
    assert metric(server, "integrity_checks_total") == 2
    assert (metric(server, "prefix_cache_queries_total"), metric(server, "prefix_cache_hits_total")) == (60, 40)
    assert (metric(server, "num_requests_running"), metric(server, "num_requests_waiting")) == (3, 2)
    assert (metric(server, "kv_cache_blocks"), metric(server, "kv_cache_used_blocks")) == (64, 48)
    assert metric(server, "kv_cache_usage_perc") == 0.75


def test_no_request_goes_through_a_thread_to_its_route() -> None:
    """FastAPI calls routes and dependencies in one, where they are plain functions."""
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    calls = [(route.endpoint, *(dependency.call for dependency in route.dependant.dependencies)) for route in routes]
    assert {len(each) for each in calls} == {1, 2}  # with the service, and without
    assert [call for each in calls for call in each if not inspect.iscoroutinefunction(call)] == []
