"""What a server answers while it waits for its last requests."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.unit.server_support import COMPLETIONS, RunningServer, events, post, running_server, wait_until

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
BODY: dict[str, Any] = {"prompt": "x", "max_tokens": 100, "ignore_eos": True}


@pytest.fixture
def draining(model: Path) -> Iterator[RunningServer]:
    with running_server(model) as server:
        server.engine.step_seconds = 0.01
        yield server


def drain(server: RunningServer) -> None:
    server.drain()
    assert wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)


def connected(server: RunningServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def ask_health(connection: socket.socket) -> bytes:
    connection.sendall(HEALTH)
    answer = b""
    while not answer.endswith(b"}"):
        answer += connection.recv(4096)
    return answer


def wait_until_empty(server: RunningServer) -> None:
    waiting = asyncio.run_coroutine_threadsafe(server.service.drain.until_empty(), server.loop)
    waiting.result(30)


def test_new_requests_are_refused_and_told_when_to_come_again(draining: RunningServer) -> None:
    drain(draining)
    answer = post(draining, COMPLETIONS, BODY)
    assert answer.status_code == 503
    assert answer.json()["error"] == {
        "message": "The server is shutting down.", "type": "service_unavailable", "param": None,
        "code": "shutting_down",
    }  # fmt: skip
    assert answer.headers["retry-after"] == "1"
    assert post(draining, "/tokenize", {"prompt": "x"}).status_code == 503
    assert draining.engine.requests == []
    wait_until_empty(draining)


def test_idle_connections_are_closed_so_that_nobody_asks_on_them(draining: RunningServer) -> None:
    with connected(draining) as fresh, connected(draining) as used, connected(draining) as arriving:
        arriving.sendall(HEALTH[:20])
        for _ in range(5):  # meanwhile what has come on the other is read
            assert b"connection: close" not in ask_health(used)
        drain(draining)
        assert (fresh.recv(4096), used.recv(4096)) == (b"", b"")
        arriving.sendall(HEALTH[20:])  # what is on its way is answered
        answer = arriving.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answer


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_each_answer_says_that_it_is_the_last_on_its_connection(path: str, draining: RunningServer) -> None:
    drain(draining)
    assert httpx.get(draining.url + path).headers["connection"] == "close"
    assert post(draining, COMPLETIONS, BODY).headers["connection"] == "close"


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
