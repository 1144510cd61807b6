"""What a server answers while it waits for its last requests."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.unit.server_support import COMPLETIONS, RunningServer, events, post, running_server, wait_until

BODY: dict[str, Any] = {"prompt": "x", "max_tokens": 100, "ignore_eos": True}


@pytest.fixture
def draining(model: Path) -> Iterator[RunningServer]:
    with running_server(model) as server:
        server.engine.step_seconds = 0.01
        yield server


def drain(server: RunningServer) -> None:
    server.call(server.service.drain.begin)
    assert wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)


def wait_until_empty(server: RunningServer) -> None:
    waiting = asyncio.run_coroutine_threadsafe(server.service.drain.until_empty(), server.loop)
    waiting.result(30)


def test_new_requests_are_refused_and_told_when_to_come_again(draining: RunningServer) -> None:
    with httpx.Client(base_url=draining.url) as client:
        client.get("/health")
        drain(draining)
        answer = client.post(COMPLETIONS, json=BODY)  # on the connection that was there before
        assert answer.status_code == 503
        assert answer.json()["error"] == {
            "message": "The server is shutting down.", "type": "service_unavailable", "param": None,
            "code": "shutting_down",
        }  # fmt: skip
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["connection"] == "close"
    assert post(draining, "/tokenize", {"prompt": "x"}).status_code == 503
    assert draining.engine.requests == []
    wait_until_empty(draining)


def test_questions_about_the_service_are_still_answered(draining: RunningServer) -> None:
    drain(draining)
    assert httpx.get(f"{draining.url}/ready").json()["state"] == "DRAINING"
    assert [httpx.get(draining.url + path).status_code for path in ("/health", "/metrics", "/v1/models")] == [200] * 3


def test_requests_that_came_before_finish_whole(draining: RunningServer) -> None:
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda body=body: answers.append(post(draining, COMPLETIONS, body)))
        for body in (BODY, {**BODY, "stream": True})
    ]
    for thread in threads:
        thread.start()
    assert wait_until(lambda: len(draining.engine.requests) == 2)
    drain(draining)
    wait_until_empty(draining)
    for thread in threads:
        thread.join(10)
    whole, streamed = sorted(answers, key=lambda answer: "stream" in answer.headers["content-type"])
    assert whole.json()["usage"]["completion_tokens"] == 100
    assert events(streamed)[-1] == "[DONE]"
    assert {whole.status_code, streamed.status_code} == {200}


def test_a_stream_that_nobody_reads_is_not_waited_for_but_can_be_gone_on_with(draining: RunningServer) -> None:
    with httpx.stream("POST", draining.url + COMPLETIONS, json={**BODY, "stream": True}) as response:
        stream_id = next(response.iter_text()).partition('"id":"')[2].partition('"')[0]
    drain(draining)
    wait_until_empty(draining)
    assert draining.client.num_in_flight == 0
    rest = httpx.get(f"{draining.url}/v1/streams/{stream_id}", timeout=30)
    assert events(rest)[-1] == "[DONE]"
