"""Every end of a request: stop strings, clients that go away, and an engine that fails."""

import json
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.unit.server_support import (
    CHAT,
    COMPLETIONS,
    EOS,
    MESSAGES,
    TOKENIZER,
    RunningServer,
    events,
    post,
    running_server,
    wait_until,
)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it_and_the_work(server: RunningServer, stream: bool) -> None:
    server.engine.script = lambda _: "the lazy dog sleeps and sleeps and sleeps"
    server.engine.holds_after = 3  # the stop string is whole: no end comes from the engine
    response = post(server, COMPLETIONS, {"prompt": "x", "max_tokens": 40, "stop": ["y d", "zzz"], "stream": stream})
    if stream:
        choices = [json.loads(event)["choices"][0] for event in events(response)[:-1]]
    else:
        choices = response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "the laz"
    assert choices[-1]["finish_reason"] == "stop"
    assert wait_until(lambda: len(server.engine.aborted) == 1)
    assert server.client.num_in_flight == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "text", "reason"),
    [
        ({"stop": "lazy"}, "the ", "lazy"),
        ({"stop": ["dog", "lazy"], "include_stop_str_in_output": True}, "the lazy", "lazy"),
        ({"stop_token_ids": [TOKENIZER.encode(" dog").ids[-1]]}, "the lazy", TOKENIZER.encode(" dog").ids[-1]),
        ({"stop_token_ids": [TOKENIZER.encode(" dog").ids[-1]], "include_stop_str_in_output": True}, "the lazy dog",
         TOKENIZER.encode(" dog").ids[-1]),
        ({}, "the lazy dog", None),
        ({"include_stop_str_in_output": True}, "the lazy dog", None),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, f"the lazy dog{EOS}", None),
        ({"stop": EOS, "skip_special_tokens": False, "ignore_eos": True}, "the lazy dog", EOS),
    ],
)  # fmt: skip
def test_an_answer_says_what_ended_it(
    server: RunningServer, stream: bool, fields: dict[str, Any], text: str, reason: str | int | None
) -> None:
    server.engine.script = lambda _: "the lazy dog"
    response = post(server, COMPLETIONS, {"prompt": "x", "max_tokens": 60, "stream": stream, **fields})
    if stream:
        choices = [json.loads(event)["choices"][0] for event in events(response)[:-1]]
    else:
        choices = response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == text
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", reason)
    assert all("stop_reason" not in choice for choice in choices[:-1])


def test_min_tokens_hold_off_every_end_but_the_longest(server: RunningServer) -> None:
    server.engine.script = lambda _: "ab"
    fields = {"min_tokens": 3, "max_tokens": 9, "skip_special_tokens": False}
    for stop, text in ({"stop": "a"}, f"ab{EOS}"), ({}, f"ab{EOS}ab"):
        answer = post(server, COMPLETIONS, {"prompt": "x", **fields, **stop}).json()
        assert answer["choices"][0]["text"] == text


def test_one_choices_stop_string_leaves_the_others_alone(server: RunningServer) -> None:
    answer = post(server, COMPLETIONS, {"prompt": "x", "n": 2, "stop": "e 1"}).json()
    assert [choice["text"] for choice in answer["choices"]] == ["choice 0", "choic"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_aborted_within_a_second(server: RunningServer, stream: bool) -> None:
    server.engine.step_seconds = 0.05
    body = json.dumps({"prompt": "x", "max_tokens": 200, "ignore_eos": True, "n": 2, "stream": stream}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        assert wait_until(lambda: len(server.engine.requests) == 2)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    left_at = server.engine.num_steps
    assert wait_until(lambda: len(server.engine.aborted_at) == 2)
    assert max(server.engine.aborted_at) < left_at + 20  # a second of the loop that the server shares with its engine
    assert server.client.num_in_flight == 0


def test_an_engine_error_before_the_first_token_is_a_500_even_for_a_stream(server: RunningServer) -> None:
    server.engine.fails_after = 0
    for stream in (False, True):
        response = post(server, COMPLETIONS, {"prompt": "x", "stream": stream})
        assert response.status_code == 500
        assert response.json()["error"] == {
            "message": "scripted failure", "type": "internal_error", "param": None, "code": "engine_error",
        }  # fmt: skip


def test_a_stream_that_has_begun_ends_in_one_error_event(server: RunningServer) -> None:
    server.engine.fails_after = 3
    *chunks, error = events(post(server, CHAT, {"messages": MESSAGES, "stream": True}))
    assert json.loads(error)["error"]["message"] == "scripted failure"
    assert not any("error" in json.loads(chunk) for chunk in chunks)


def test_when_the_engine_is_lost_open_requests_end_and_new_ones_get_503(server: RunningServer) -> None:
    server.engine.step_seconds = 0.05
    body = {"prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", server.url + COMPLETIONS, json=body) as response:
        pieces = response.iter_text()
        next(pieces)
        server.fail("rank 0 was killed by SIGKILL")
        rest = "".join(pieces)
    assert json.loads(rest.split("data: ")[-1])["error"]["message"] == "rank 0 was killed by SIGKILL"
    late = post(server, COMPLETIONS, {"prompt": "x"})
    assert (late.status_code, late.json()["error"]["code"]) == (503, "engine_not_ready")
    assert late.headers["retry-after"] == "1"


def test_before_the_engine_is_ready_requests_get_503_and_the_process_is_alive(model: Path) -> None:
    with running_server(model, ready=False) as server:
        assert post(server, CHAT, {"messages": MESSAGES}).status_code == 503
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        ready = httpx.get(f"{server.url}/ready")
        assert (ready.status_code, ready.json()["state"]) == (503, "STARTING")
