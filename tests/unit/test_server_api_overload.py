"""Bounds and deadlines as clients see them, before a scripted engine."""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.metric_samples import sample_lines
from tests.unit.server_support import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    RunningServer,
    events,
    openai_client,
    post,
    running_server,
    wait_until,
)

LONG: dict[str, Any] = {"prompt": "x", "max_tokens": 100, "ignore_eos": True}


@pytest.fixture
def small(model: Path) -> Iterator[RunningServer]:
    """Takes two sequences at once and lets two wait; they go on when a test says so."""
    with running_server(model, max_num_seqs=1, max_queued_requests=2) as server:
        server.engine.is_paused = True
        yield server


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def value(server: RunningServer, name: str, labels: str = "") -> float:
    for line in sample_lines(httpx.get(f"{server.url}/metrics").text):
        if line.startswith(f"ryzanstein_{name}{labels} "):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


def crowd(server: RunningServer, pool: ThreadPoolExecutor, **changes: Any) -> list[Future[httpx.Response]]:
    """Send as many requests as are taken; return when two are in the engine and two wait."""
    answers = [pool.submit(post, server, COMPLETIONS, {**LONG, **changes}) for _ in range(4)]
    assert wait_until(lambda: value(server, "queued_requests") == 2 and len(server.engine.requests) == 2)
    return answers


def test_beyond_the_bound_openais_rate_limit_error_says_when_to_come_again(
    small: RunningServer, pool: ThreadPoolExecutor
) -> None:
    answers = crowd(small, pool)
    for path, body in ((COMPLETIONS, LONG), (CHAT, {"messages": MESSAGES}), (COMPLETIONS, {**LONG, "stream": True})):
        refused = post(small, path, body)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
    with openai_client(small.url) as client, pytest.raises(openai.RateLimitError, match="too much to do"):
        client.completions.create(model="scripted", prompt="x")
    small.engine.is_paused = False
    assert [answer.result().status_code for answer in answers] == [200] * 4
    assert value(small, "requests_rejected_total", '{reason="queue_full"}') == 4
    assert value(small, "queued_requests") == value(small, "queued_tokens") == 0


def test_where_all_must_be_refused_nothing_of_a_request_is_read(small: RunningServer, pool: ThreadPoolExecutor) -> None:
    answers = crowd(small, pool)
    headers = {"content-type": "application/json"}
    for path in (COMPLETIONS, CHAT):
        assert httpx.post(small.url + path, content=b"no JSON", headers=headers).status_code == 429
    assert httpx.post(f"{small.url}/tokenize", json={"prompt": "x"}).status_code == 200
    small.engine.is_paused = False
    assert [answer.result().status_code for answer in answers] == [200] * 4


def test_prompts_beyond_the_bound_of_tokens_are_refused(model: Path, pool: ThreadPoolExecutor) -> None:
    with running_server(model, max_num_seqs=1, max_queued_tokens=10) as server:
        server.engine.is_paused = True
        answers = crowd(server, pool, prompt=[5, 6, 7, 8, 9])
        assert post(server, COMPLETIONS, LONG).json()["error"]["code"] == "queue_full"
        assert value(server, "queued_tokens") == 10
        server.engine.is_paused = False
        assert [answer.result().status_code for answer in answers] == [200] * 4


def test_a_client_that_leaves_the_queue_leaves_nothing(small: RunningServer, pool: ThreadPoolExecutor) -> None:
    running = [pool.submit(post, small, COMPLETIONS, LONG) for _ in range(2)]
    assert wait_until(lambda: len(small.engine.requests) == 2)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(small.url + COMPLETIONS, json={**LONG, "n": 2}, timeout=0.2)
    assert wait_until(lambda: value(small, "queued_requests") == 0)
    assert value(small, "request_success_total", '{finished_reason="abort"}') == 2
    small.engine.is_paused = False
    assert [answer.result().status_code for answer in running] == [200, 200]
    assert len(small.engine.requests) == 2
    assert small.engine.aborted == []


@pytest.mark.parametrize("is_waiting", [False, True])
def test_a_requests_own_deadline_ends_it_with_504(
    small: RunningServer, pool: ThreadPoolExecutor, is_waiting: bool
) -> None:
    others = [pool.submit(post, small, COMPLETIONS, LONG) for _ in range(2 if is_waiting else 0)]
    assert wait_until(lambda: len(small.engine.requests) == len(others))
    late = post(small, COMPLETIONS, {**LONG, "timeout": 1.5})
    assert late.status_code == 504
    assert late.json()["error"] == {
        "message": "The request was not finished within 1.5 seconds.",
        "type": "timeout",
        "param": None,
        "code": "timeout",
    }
    assert value(small, "requests_timed_out_total") == 1
    assert wait_until(lambda: len(small.engine.aborted) == (0 if is_waiting else 1))
    small.engine.is_paused = False
    assert all(other.result().status_code == 200 for other in others)


def test_a_stream_that_has_begun_ends_with_an_error_event(small: RunningServer) -> None:
    small.engine.is_paused, small.engine.holds_after = False, 5
    answer = post(small, COMPLETIONS, {**LONG, "timeout": 2, "stream": True})
    *chunks, last = events(answer)
    assert answer.status_code == 200
    assert chunks
    assert json.loads(last.partition("data: ")[2] or last)["error"]["code"] == "timeout"
    assert wait_until(lambda: len(small.engine.aborted) == 1)


@pytest.mark.parametrize(("timeout", "status"), [(None, 504), (1000, 504), (0.1, 504)])
def test_the_smaller_of_both_deadlines_holds(model: Path, timeout: float | None, status: int) -> None:
    with running_server(model, request_timeout=1) as server:
        server.engine.step_seconds = 0.05
        answer = post(server, COMPLETIONS, {**LONG, "timeout": timeout})
        assert answer.status_code == status
        assert f"within {min(timeout or 1, 1):g} seconds" in answer.json()["error"]["message"]


def test_a_request_that_is_in_time_is_served(server: RunningServer) -> None:
    assert post(server, COMPLETIONS, {"prompt": "x", "max_tokens": 2, "timeout": 60}).status_code == 200
    assert value(server, "requests_timed_out_total") == 0


def test_whoever_waits_when_the_service_ends_is_told_to_try_again(
    small: RunningServer, pool: ThreadPoolExecutor
) -> None:
    answers = crowd(small, pool)
    small.fail("The server is shutting down.")
    statuses = sorted(answer.result().status_code for answer in answers)
    assert statuses == [500, 500, 503, 503]
