"""The API before a scripted engine: every field, every refusal, every end."""

import json
import math
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import AddedToken

from engine.protocol.messages import GroupState, GroupStatus, HistogramDelta, RankStats, SchedulerStats, StatsReport
from engine.protocol.stats import TIME_BUCKETS
from server.chat_template import ChatTemplate
from tests.unit.server_support import (
    EOS,
    MAX_MODEL_LEN,
    VOCAB_SIZE,
    RunningServer,
    byte_level_tokenizer,
    openai_client,
    post,
    running_server,
    wait_until,
    write_model,
)

LATENCY = "e2e_request_latency_seconds"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "hello"}]
TOKENIZER = byte_level_tokenizer()
LONG_PROMPT = "ab 1\n" * 500_000  # 2.5 MB, some seconds to tokenize


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), temperature=0.5, top_p=0.9)


@pytest.fixture
def server(model: Path) -> Iterator[RunningServer]:
    with running_server(model) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai_client(server.url) as client:
        yield client


def events(response: httpx.Response) -> list[str]:
    assert response.headers["content-type"].startswith("text/event-stream")
    return [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]


# --- answers ---------------------------------------------------------------------------------------------------------


def test_a_completion_has_openais_shape(server: RunningServer) -> None:
    server.engine.script = lambda _: "lazy dog"
    answer = post(server, COMPLETIONS, {"prompt": "the quick", "model": "scripted", "max_tokens": 50}).json()
    prompt_tokens = len(TOKENIZER.encode("the quick").ids)
    completion_tokens = len(TOKENIZER.encode("lazy dog", add_special_tokens=False).ids) + 1  # the stop token
    assert answer.pop("id").startswith("cmpl-")
    assert abs(answer.pop("created") - time.time()) < 10
    assert answer == {
        "object": "text_completion",
        "model": "scripted",
        "choices": [{"index": 0, "text": "lazy dog", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def test_a_chat_completion_has_openais_shape(server: RunningServer) -> None:
    answer = post(server, CHAT, {"messages": MESSAGES, "max_tokens": 50}).json()
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("usage")["total_tokens"] > 0
    assert abs(answer.pop("created") - time.time()) < 10
    assert answer == {
        "object": "chat.completion",
        "model": "scripted",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "choice 0", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
    }


def test_a_completion_streams_as_openais_does(server: RunningServer) -> None:
    server.engine.script = lambda _: "hello"
    body = {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = events(post(server, COMPLETIONS, body))
    assert done == "[DONE]"
    decoded = [json.loads(chunk) for chunk in chunks]
    assert "".join(chunk["choices"][0]["text"] for chunk in decoded) == "hello"
    assert [chunk["choices"][0]["finish_reason"] for chunk in decoded] == [None] * (len(decoded) - 1) + ["stop"]
    assert all(chunk["usage"] is None for chunk in decoded)
    assert json.loads(usage)["choices"] == []
    assert json.loads(usage)["usage"]["total_tokens"] > 0


def test_a_chat_stream_begins_with_the_role_and_ends_with_the_reason(server: RunningServer) -> None:
    *chunks, done = events(post(server, CHAT, {"messages": MESSAGES, "stream": True}))
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert done == "[DONE]"
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"]["content"] for choice in choices[1:-1]) == "choice 0"
    assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "stop")
    assert all("usage" not in json.loads(chunk) for chunk in chunks)


def test_tokens_that_were_queued_come_in_one_piece(server: RunningServer) -> None:
    server.engine.script = lambda _: "abc"
    with httpx.stream("POST", server.url + COMPLETIONS, json={"prompt": ["x"] * 8, "stream": True}) as response:
        pieces = list(response.iter_raw())
    assert max(piece.count(b"data: ") for piece in pieces) >= 8  # one step's tokens of eight sequences


# --- the official client ---------------------------------------------------------------------------------------------


def test_the_official_client_lists_models(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert card.id == "scripted"
    assert card.model_dump()["max_model_len"] == MAX_MODEL_LEN
    assert client.models.retrieve("scripted").id == "scripted"


def test_the_official_client_completes_and_chats(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="scripted", prompt=["a", "b"], n=2, seed=-1, user="me")
    assert [(choice.index, choice.text) for choice in completion.choices] == [
        (0, "choice 0"), (1, "choice 1"), (2, "choice 0"), (3, "choice 1"),
    ]  # fmt: skip
    chat = client.chat.completions.create(model="scripted", messages=MESSAGES, metadata={"a": "b"}, store=False)
    assert chat.choices[0].message.content == "choice 0"
    again = [*MESSAGES, chat.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "more"}]}]
    assert client.chat.completions.create(model="scripted", messages=again).choices[0].finish_reason == "stop"


def test_the_official_client_streams(client: openai.OpenAI) -> None:
    texts = ["", ""]
    stream = client.chat.completions.create(
        model="scripted", messages=MESSAGES, n=2, stream=True, stream_options={"include_usage": True}
    )
    usage = None
    for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == ["choice 0", "choice 1"]
    assert usage is not None
    assert usage.completion_tokens > 2


def test_the_official_client_gets_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist") as missing:
        client.completions.create(model="other", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="scripted", prompt="x", temperature=-1)
    assert bad.value.param == "temperature"


def test_the_official_client_sees_an_engine_error_in_a_stream(server: RunningServer, client: openai.OpenAI) -> None:
    server.engine.fails_after = 2
    with pytest.raises(openai.APIError, match="scripted failure"):
        list(client.completions.create(model="scripted", prompt="x", stream=True))


# --- what reaches the engine -----------------------------------------------------------------------------------------


def test_all_sampling_fields_reach_the_engine(server: RunningServer) -> None:
    fields = {"temperature": 0.7, "top_p": 0.8, "top_k": 5, "min_p": 0.1, "seed": -1, "max_tokens": 3, "n": 2}
    post(server, COMPLETIONS, {"prompt": [7, 8], **fields})
    first, second = server.engine.requests
    assert first.prompt_token_ids == [7, 8]
    sampling = first.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.7, 0.8, 5, 0.1)
    assert (sampling.seed, sampling.max_tokens) == (2**64 - 1, 3)
    assert sampling.stop_token_ids == (TOKENIZER.token_to_id(EOS),)
    assert [first.sampling.choice_index, second.sampling.choice_index] == [0, 1]
    assert first.sampling.seed == second.sampling.seed


def test_what_a_request_leaves_out_is_the_models_default(server: RunningServer) -> None:
    post(server, COMPLETIONS, {"prompt": "x", "temperature": None})
    post(server, COMPLETIONS, {"prompt": "x"})
    first, second = (request.sampling for request in server.engine.requests)
    assert (first.temperature, first.top_p, first.top_k, first.min_p, first.max_tokens) == (0.5, 0.9, 0, 0.0, 16)
    assert first.seed != second.seed


def test_chat_may_use_what_is_left_of_the_context(server: RunningServer) -> None:
    post(server, CHAT, {"messages": MESSAGES})
    (request,) = server.engine.requests
    assert request.sampling.max_tokens == MAX_MODEL_LEN - len(request.prompt_token_ids)


def test_greedy_needs_no_other_sampling_field(server: RunningServer) -> None:
    post(server, COMPLETIONS, {"prompt": "x", "temperature": 0, "top_k": -1, "top_p": 0.5})
    sampling = server.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 1.0, 0)


def test_the_end_of_text_can_be_ignored(server: RunningServer) -> None:
    server.engine.script = lambda _: "ab"
    answer = post(server, COMPLETIONS, {"prompt": "x", "ignore_eos": True, "max_tokens": 6}).json()
    assert server.engine.requests[0].sampling.stop_token_ids == ()
    assert answer["choices"][0] == {"index": 0, "text": "abab", "logprobs": None, "finish_reason": "length"}


@pytest.mark.parametrize("prompt", ["x y", ["x y", "z"], [1, 2, 3], [[1, 2], [3]]])
def test_prompts_are_texts_or_ids_one_or_many(server: RunningServer, prompt: Any) -> None:
    post(server, COMPLETIONS, {"prompt": prompt}).raise_for_status()
    sent = [request.prompt_token_ids for request in server.engine.requests]
    many = (
        prompt if isinstance(prompt[0], list) or (isinstance(prompt, list) and isinstance(prompt[0], str)) else [prompt]
    )
    assert sent == [TOKENIZER.encode(item).ids if isinstance(item, str) else item for item in many]


def test_an_empty_text_is_a_prompt_where_the_tokenizer_frames_it(server: RunningServer) -> None:
    post(server, COMPLETIONS, {"prompt": ""}).raise_for_status()
    assert server.engine.requests[0].prompt_token_ids == TOKENIZER.encode("").ids


def test_messages_go_through_the_template_without_a_second_frame(server: RunningServer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    post(server, CHAT, {"messages": messages}).raise_for_status()
    ids = server.engine.requests[0].prompt_token_ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == "<|bos|>[system]be brief[user]a\nb[assistant]"
    assert ids.count(ids[0]) == 1


def test_what_arrives_together_is_sent_together(server: RunningServer) -> None:
    post(server, COMPLETIONS, {"prompt": ["a", "b", "c"], "n": 3})
    assert [len(batch.new) for batch in server.engine.batches if batch.new] == [9]


# --- stop strings and aborts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it_and_the_work(server: RunningServer, stream: bool) -> None:
    server.engine.script = lambda _: "the lazy dog sleeps and sleeps and sleeps"
    response = post(server, COMPLETIONS, {"prompt": "x", "max_tokens": 40, "stop": ["y d", "zzz"], "stream": stream})
    if stream:
        choices = [json.loads(event)["choices"][0] for event in events(response)[:-1]]
    else:
        choices = response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "the laz"
    assert choices[-1]["finish_reason"] == "stop"
    assert wait_until(lambda: len(server.engine.aborted) == 1)
    assert server.client.num_in_flight == 0


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
    assert wait_until(lambda: len(server.engine.aborted) == 2, timeout=1.0)
    assert server.client.num_in_flight == 0


# --- errors ----------------------------------------------------------------------------------------------------------


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


COMPLETION_ERRORS: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": 7}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": [[]]}),
    ("prompt", {"prompt": ["a", 1]}),
    ("prompt", {"prompt": [1, True]}),
    ("prompt", {"prompt": [1.5]}),
    ("prompt", {"prompt": {"a": 1}}),
    ("prompt", {"prompt": ["x"] * 257}),
    ("prompt", {"prompt": [-1]}),
    ("prompt", {"prompt": [[1], [VOCAB_SIZE]]}),
    ("prompt", {"prompt": [10**30]}),
    ("prompt", {"prompt": "\ud800"}),
    ("prompt", {"prompt": "x" * 5000}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": "16"}),
    ("max_tokens", {"max_tokens": True}),
    ("max_tokens", {"max_tokens": MAX_MODEL_LEN}),
    ("max_tokens", {"max_tokens": 10**30}),
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": 1e9}),
    ("temperature", {"temperature": math.nan}),
    ("temperature", {"temperature": math.inf}),
    ("temperature", {"temperature": "0"}),
    ("top_p", {"top_p": 0}),
    ("top_p", {"top_p": 1.1}),
    ("top_p", {"top_p": math.nan}),
    ("top_k", {"top_k": -2}),
    ("top_k", {"top_k": 1.5}),
    ("top_k", {"top_k": 10**30}),
    ("min_p", {"min_p": -0.1}),
    ("min_p", {"min_p": 1.1}),
    ("seed", {"seed": 2**63}),
    ("seed", {"seed": "x"}),
    ("n", {"n": 0}),
    ("n", {"n": 129}),
    ("n", {"n": 128, "prompt": ["x"] * 9}),
    ("stop", {"stop": 7}),
    ("stop[0]", {"stop": ""}),
    ("stop[1]", {"stop": ["a", 7]}),
    ("stop", {"stop": ["a"] * 17}),
    ("stop[0]", {"stop": "a" * 1025}),
    ("ignore_eos", {"ignore_eos": "yes"}),
    ("stream", {"stream": "yes"}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("stream_options", {"stream_options": 7, "stream": True}),
    ("stream_options.foo", {"stream_options": {"foo": 1}, "stream": True}),
    ("stop[0]", {"stop": "\ud800"}),
    ("user", {"user": 7}),
    ("user", {"user": "\udfff"}),
    ("model", {"model": 7}),
    ("model", {"model": "\ud800"}),
    ("foo", {"foo": 1}),
    ("a\\ud800", {"a\ud800": 1}),
    ("stream_options.\\ud800", {"stream_options": {"\ud800": 1}, "stream": True}),
    ("echo", {"echo": True}),
    ("echo", {"echo": 0}),
    ("logprobs", {"logprobs": 0}),
    ("best_of", {"best_of": 2}),
    ("suffix", {"suffix": "x"}),
    ("logit_bias", {"logit_bias": {"1": 1}}),
    ("presence_penalty", {"presence_penalty": 0.5}),
    ("frequency_penalty", {"frequency_penalty": False}),
    ("repetition_penalty", {"repetition_penalty": 1.1}),
    ("response_format", {"response_format": {"type": "json_object"}}),
    ("stop_token_ids", {"stop_token_ids": [1]}),
]
CHAT_ERRORS: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": []}),
    ("messages", {"messages": None}),
    ("messages", {"messages": "hello"}),
    ("messages[0]", {"messages": ["hello"]}),
    ("messages[0].role", {"messages": [{"role": "robot", "content": "x"}]}),
    ("messages[0].role", {"messages": [{"role": "tool", "content": "x"}]}),
    ("messages[0].role", {"messages": [{"content": "x"}]}),
    ("messages[1].content", {"messages": [*MESSAGES, {"role": "user"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": None}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": []}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": "\udfff"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]}),
    ("messages[0].tool_calls", {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}),
    ("messages[0].name", {"messages": [{"role": "user", "content": "x", "name": "\ud800"}]}),
    ("messages[0].\\ud800", {"messages": [{"role": "user", "content": "x", "\ud800": 1}]}),
    ("safety_identifier", {"safety_identifier": "\ud800"}),
    ("prompt_cache_key", {"prompt_cache_key": "\ud800"}),
    ("messages[0].foo", {"messages": [{"role": "user", "content": "x", "foo": 1}]}),
    ("messages", {"messages": [{"role": "user", "content": "x" * 5000}]}),
    ("max_tokens", {"max_tokens": 10_000}),
    ("max_completion_tokens", {"max_completion_tokens": 10_000}),
    ("max_completion_tokens", {"max_completion_tokens": 1, "max_tokens": 2}),
    ("tools", {"tools": [{"type": "function"}]}),
    ("tool_choice", {"tool_choice": "required"}),
    ("logprobs", {"logprobs": True}),
    ("top_logprobs", {"top_logprobs": 3}),
    ("store", {"store": True}),
    ("modalities", {"modalities": ["text", "audio"]}),
    ("reasoning_effort", {"reasoning_effort": "high"}),
    ("prompt", {"prompt": "x"}),
]


@pytest.fixture(scope="module")
def idle_server(model: Path) -> Iterator[RunningServer]:
    """For requests that never reach the engine."""
    with running_server(model) as server:
        yield server


def body_of(base: dict[str, Any], changed: dict[str, Any]) -> bytes:
    return json.dumps({**base, **changed}).encode()  # unlike httpx's own encoding this one writes NaN


def refusal(server: RunningServer, path: str, body: bytes) -> dict[str, Any]:
    response = httpx.post(server.url + path, content=body, headers={"content-type": "application/json"}, timeout=30)
    assert response.status_code == 400
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert sorted(error) == ["code", "message", "param", "type"]
    assert server.engine.requests == []
    return error


def names(error: dict[str, Any], param: str) -> bool:
    """Return whether the message is about `param` and no other field."""
    starts = {
        "context_length_exceeded": f"This model's maximum context length is {MAX_MODEL_LEN} tokens; ",
        "unknown_parameter": f"Unrecognized request argument supplied: {param}.",
        "missing_required_parameter": f"Missing required parameter: {param}.",
    }
    message: str = error["message"]
    return message.startswith(starts.get(error["code"], f"{param}: "))


@pytest.mark.parametrize(("param", "changed"), COMPLETION_ERRORS)
def test_a_bad_completion_request_gets_a_400_that_names_the_field(
    idle_server: RunningServer, param: str, changed: dict[str, Any]
) -> None:
    error = refusal(idle_server, COMPLETIONS, body_of({"prompt": "x"}, changed))
    assert error["param"] == param
    assert names(error, param)


@pytest.mark.parametrize(("param", "changed"), CHAT_ERRORS)
def test_a_bad_chat_request_gets_a_400_that_names_the_field(
    idle_server: RunningServer, param: str, changed: dict[str, Any]
) -> None:
    error = refusal(idle_server, CHAT, body_of({"messages": MESSAGES}, changed))
    assert error["param"] == param
    assert names(error, param)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'"x"', b"null", b"\xff", b"[" * 100_000, b'{"seed": 1' + b"0" * 9999 + b"}"]
)
def test_a_body_that_is_no_json_object_gets_a_400(idle_server: RunningServer, body: bytes) -> None:
    refusal(idle_server, COMPLETIONS, body)


def test_a_key_that_is_no_text_is_said_to_be_unknown(idle_server: RunningServer) -> None:
    error = refusal(idle_server, COMPLETIONS, b'{"prompt": "x", "a\\ud800": 1}')
    assert error["code"] == "unknown_parameter"
    assert error["message"] == "Unrecognized request argument supplied: a\\ud800."


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(idle_server: RunningServer) -> None:
    for path, body in (
        (COMPLETIONS, {"prompt": ["x", LONG_PROMPT]}),
        (CHAT, {"messages": [{"role": "user", "content": LONG_PROMPT}]}),
    ):
        error = refusal(idle_server, path, json.dumps(body).encode())
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == next(iter(body))
        assert "the prompt has at least" in error["message"]


@pytest.fixture
def slow_tokenizer_server(tmp_path: Path) -> Iterator[RunningServer]:
    """Has to tokenize a text to know how long it is."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])  # may stand for any number of spaces
    with running_server(write_model(tmp_path, tokenizer)) as server:
        yield server


def test_other_requests_are_answered_while_a_large_prompt_is_tokenized(slow_tokenizer_server: RunningServer) -> None:
    server, waits = slow_tokenizer_server, []
    with ThreadPoolExecutor(1) as pool, httpx.Client() as client:
        large = pool.submit(post, server, COMPLETIONS, {"prompt": LONG_PROMPT})
        while not large.done():
            begin = time.monotonic()
            client.get(f"{server.url}/health").raise_for_status()
            waits.append(time.monotonic() - begin)
            time.sleep(0.05)
        error = large.result().json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "at least" not in error["message"]
    assert len(waits) > 10
    assert max(waits) < 1


def test_a_prompt_being_tokenized_gets_503_when_the_service_ends(slow_tokenizer_server: RunningServer) -> None:
    server = slow_tokenizer_server
    with ThreadPoolExecutor(3) as pool:
        large = [pool.submit(post, server, COMPLETIONS, {"prompt": LONG_PROMPT}) for _ in range(3)]
        time.sleep(0.5)
        server.fail("The server is shutting down.")
        answers = [future.result() for future in large]
    assert [answer.status_code for answer in answers] == [503] * 3
    assert {answer.json()["error"]["message"] for answer in answers} == {"The server is shutting down."}


def test_a_context_too_long_is_refused_with_the_numbers(idle_server: RunningServer) -> None:
    error = refusal(idle_server, COMPLETIONS, body_of({"prompt": [5] * 200}, {"max_tokens": 100}))
    assert error["code"] == "context_length_exceeded"
    assert all(number in error["message"] for number in ("200", "100", str(MAX_MODEL_LEN)))


def test_neutral_values_of_unsupported_fields_are_accepted(server: RunningServer) -> None:
    neutral: dict[str, Any] = {
        "model": None, "temperature": None, "n": None, "stop": None, "stream": None, "stream_options": None,
        "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "response_format": {"type": "text"},
        "best_of": 1, "echo": False, "user": "me", "metadata": {"a": "b"}, "logprobs": None,
    }  # fmt: skip
    post(server, COMPLETIONS, {"prompt": "x", "suffix": None, **neutral}).raise_for_status()
    chat: dict[str, Any] = {
        "tools": [], "tool_choice": "none", "store": False, "logprobs": False, "top_logprobs": 0,
        "service_tier": "auto", "modalities": ["text"], "parallel_tool_calls": True, "reasoning_effort": None,
    }  # fmt: skip
    post(server, CHAT, {"messages": MESSAGES, **neutral, **chat}).raise_for_status()


def test_unknown_urls_and_methods_answer_in_the_same_shape(idle_server: RunningServer) -> None:
    missing, method = httpx.get(f"{idle_server.url}/v2"), httpx.get(idle_server.url + CHAT)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_url")
    assert (method.status_code, method.json()["error"]["code"]) == (405, "method_not_supported")
    assert httpx.get(f"{idle_server.url}/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_a_model_without_a_template_refuses_chat(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    (model / "tokenizer_config.json").write_text("{}")
    with running_server(model) as server:
        error = post(server, CHAT, {"messages": MESSAGES}).json()["error"]
    assert (error["code"], error["param"]) == ("no_chat_template", "messages")


def test_the_templates_refusal_is_a_400(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    (model / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with running_server(model) as server:
        response = post(server, CHAT, {"messages": MESSAGES})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "messages: roles must alternate"


# --- operation -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("is_ready", "status"), [(True, 200), (False, 503)])
def test_health_and_readiness_answer_head_without_a_body(model: Path, is_ready: bool, status: int) -> None:
    with running_server(model, ready=is_ready) as server:
        health, ready = httpx.head(f"{server.url}/health"), httpx.head(f"{server.url}/ready")
    assert (health.status_code, ready.status_code) == (200, status)
    assert health.content == ready.content == b""


def raw_exchange(server: RunningServer, sent: bytes) -> bytes:
    """Send bytes over one connection; return what comes until the server closes it."""
    host, port = server.url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(sent)
        while piece := connection.recv(65536):
            received += piece
    return received


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
    assert {"200", "400", "404", "500", "503"} == set(operation["responses"])
    assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    prompt = schema["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"]
    assert [item["type"] for item in prompt["anyOf"]] == ["string", "array", "array", "array"]


def test_operations_have_readable_summaries(idle_server: RunningServer) -> None:
    paths = httpx.get(f"{idle_server.url}/openapi.json").json()["paths"]
    summaries = {path: operation["summary"] for path, methods in paths.items() for operation in methods.values()}
    assert summaries == {
        COMPLETIONS: "Continue a text",
        CHAT: "Answer a conversation",
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
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith(f"ryzanstein_{name} "):
            return float(line.rsplit(" ", 1)[1])
    return None


def test_latencies_and_tokens_are_counted(server: RunningServer) -> None:
    server.engine.script = lambda _: "abc"
    post(server, COMPLETIONS, {"prompt": [5, 6, 7], "n": 2, "ignore_eos": True, "max_tokens": 5})
    post(server, COMPLETIONS, {"prompt": [5], "stop": "a"})
    assert metric(server, "prompt_tokens_total") == 4
    assert metric(server, 'request_success_total{finished_reason="length"}') == 2
    assert metric(server, 'request_success_total{finished_reason="stop"}') == 1
    assert metric(server, "time_to_first_token_seconds_count") == 3
    assert metric(server, "inter_token_latency_seconds_count") == 8
    assert metric(server, "generation_tokens_total") == 11
    assert metric(server, "e2e_request_latency_seconds_count") == 3
    assert metric(server, "request_queue_time_seconds_sum") == pytest.approx(0.003)


def test_ends_are_counted_from_zero(idle_server: RunningServer) -> None:
    for reason in ("stop", "length", "abort", "error"):
        assert metric(idle_server, f'request_success_total{{finished_reason="{reason}"}}') == 0


def test_short_waits_in_the_queue_are_told_apart(server: RunningServer) -> None:
    post(server, COMPLETIONS, {"prompt": [5]})  # waits 1 ms
    assert metric(server, 'request_queue_time_seconds_bucket{le="0.0005"}') == 0
    assert metric(server, 'request_queue_time_seconds_bucket{le="0.001"}') == 1


def test_whole_latencies_are_those_of_sequences_that_came_to_their_end(server: RunningServer) -> None:
    post(server, COMPLETIONS, {"prompt": [5], "max_tokens": 2, "ignore_eos": True})
    post(server, COMPLETIONS, {"prompt": [5], "stop": "choice"})
    assert metric(server, "e2e_request_latency_seconds_count") == 2
    server.engine.fails_after = 1
    post(server, COMPLETIONS, {"prompt": [5]})
    assert metric(server, 'request_success_total{finished_reason="error"}') == 1
    assert metric(server, "e2e_request_latency_seconds_count") == 2


def test_latencies_include_what_comes_before_the_engine(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    loops = "{% for _ in range(99999) %}{% for _ in range(30) %}{% endfor %}{% endfor %}hello"
    (model / "chat_template.jinja").write_text(loops)
    with running_server(model) as server:
        begin = time.perf_counter()
        ChatTemplate(loops, {}).render([])
        slow = time.perf_counter() - begin
        post(server, CHAT, {"messages": MESSAGES}).raise_for_status()
        first, whole = (metric(server, f"{name}_sum") for name in ("time_to_first_token_seconds", LATENCY))
    assert slow > 0.1
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
        assert family.name.startswith("ryzanstein_")
        assert family.documentation
        assert family.type != "unknown"


def test_the_engines_statistics_are_added_up(server: RunningServer) -> None:
    counts = [1, *[0] * (len(TIME_BUCKETS) - 1), 2]
    stats = RankStats(1, 1, {"all_reduce": HistogramDelta(counts, 25.0)}, {"resident": 1000})
    scheduler = SchedulerStats(
        num_running=3,
        num_waiting=2,
        num_kv_blocks=64,
        num_free_kv_blocks=16,
        preemptions=1,
        steps=10,
        integrity_checks=1,
    )
    for _ in range(2):
        server.send(StatsReport(1, scheduler, [stats]))
    assert wait_until(lambda: metric(server, "engine_steps_total") == 20)
    labels = 'operation="all_reduce",rank="1"'
    assert metric(server, f"collective_seconds_count{{{labels}}}") == 6
    assert metric(server, f"collective_seconds_sum{{{labels}}}") == 50
    assert metric(server, f'collective_seconds_bucket{{le="5e-06",{labels}}}') == 2
    assert metric(server, f'collective_seconds_bucket{{le="10.0",{labels}}}') == 2
    assert metric(server, 'rank_memory_bytes{kind="resident",rank="1"}') == 1000
    assert metric(server, "num_preemptions_total") == 2
    assert metric(server, "integrity_checks_total") == 2
    assert (metric(server, "num_requests_running"), metric(server, "num_requests_waiting")) == (3, 2)
    assert (metric(server, "kv_cache_blocks"), metric(server, "kv_cache_used_blocks")) == (64, 48)
    assert metric(server, "kv_cache_usage_perc") == 0.75
