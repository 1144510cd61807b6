"""Bad input gets a 4xx in OpenAI's shape that names the field."""

import math
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.unit.server_support import (
    CHAT,
    COMPLETIONS,
    MAX_MODEL_LEN,
    MESSAGES,
    VOCAB_SIZE,
    RunningServer,
    body_of,
    post,
    refusal,
    running_server,
    write_model,
)

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


def test_a_context_too_long_is_refused_with_the_numbers(idle_server: RunningServer) -> None:
    error = refusal(idle_server, COMPLETIONS, body_of({"prompt": [5] * 200}, {"max_tokens": 100}))
    assert error["code"] == "context_length_exceeded"
    assert all(number in error["message"] for number in ("200", "100", str(MAX_MODEL_LEN)))


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
