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

INVALID, UNSUPPORTED, UNKNOWN = "invalid_value", "unsupported_value", "unknown_parameter"
MISSING, TOO_LONG, NO_MODEL = "missing_required_parameter", "context_length_exceeded", "model_not_found"
NEAR_MAX_DEPTH: Any = {}
for _ in range(400):
    NEAR_MAX_DEPTH = {"a": NEAR_MAX_DEPTH}

Case = tuple[str, str, Any]  # the field that the error names, the error's code, what the body's field is set to

# Fields of both endpoints: a value of None stands for null.
COMMON: list[Case] = [
    ("model", INVALID, {"model": 7}),
    ("model", INVALID, {"model": "\ud800"}),
    ("model", NO_MODEL, {"model": "other"}),
    ("model", NO_MODEL, {"model": ""}),
    ("max_tokens", INVALID, {"max_tokens": 0}),
    ("max_tokens", INVALID, {"max_tokens": -1}),
    ("max_tokens", INVALID, {"max_tokens": "16"}),
    ("max_tokens", INVALID, {"max_tokens": 1.5}),
    ("max_tokens", INVALID, {"max_tokens": True}),
    ("max_tokens", INVALID, {"max_tokens": 10**30}),
    ("max_tokens", TOO_LONG, {"max_tokens": MAX_MODEL_LEN}),
    ("max_tokens", TOO_LONG, {"max_tokens": 2**63 - 1}),
    ("min_tokens", INVALID, {"min_tokens": -1}),
    ("min_tokens", INVALID, {"min_tokens": "1"}),
    ("min_tokens", INVALID, {"min_tokens": 5, "max_tokens": 4}),
    ("min_tokens", INVALID, {"min_tokens": MAX_MODEL_LEN}),
    ("temperature", INVALID, {"temperature": -0.1}),
    ("temperature", INVALID, {"temperature": 1e9}),
    ("temperature", INVALID, {"temperature": math.nan}),
    ("temperature", INVALID, {"temperature": math.inf}),
    ("temperature", INVALID, {"temperature": -math.inf}),
    ("temperature", INVALID, {"temperature": "0"}),
    ("temperature", INVALID, {"temperature": False}),
    ("temperature", INVALID, {"temperature": [1]}),
    ("top_p", INVALID, {"top_p": 0}),
    ("top_p", INVALID, {"top_p": 1.1}),
    ("top_p", INVALID, {"top_p": math.nan}),
    ("top_k", INVALID, {"top_k": -2}),
    ("top_k", INVALID, {"top_k": 1.5}),
    ("top_k", INVALID, {"top_k": 10**30}),
    ("min_p", INVALID, {"min_p": -0.1}),
    ("min_p", INVALID, {"min_p": 1.1}),
    ("timeout", INVALID, {"timeout": 0}),
    ("timeout", INVALID, {"timeout": -1.5}),
    ("timeout", INVALID, {"timeout": 1e-9}),
    ("timeout", INVALID, {"timeout": 1e9}),
    ("timeout", INVALID, {"timeout": math.nan}),
    ("timeout", INVALID, {"timeout": math.inf}),
    ("timeout", INVALID, {"timeout": True}),
    ("timeout", INVALID, {"timeout": "5"}),
    ("seed", INVALID, {"seed": 2**63}),
    ("seed", INVALID, {"seed": "x"}),
    ("seed", INVALID, {"seed": 1.0}),
    ("n", INVALID, {"n": 0}),
    ("n", INVALID, {"n": -1}),
    ("n", INVALID, {"n": 129}),
    ("n", INVALID, {"n": 10**30}),
    ("presence_penalty", INVALID, {"presence_penalty": 2.1}),
    ("presence_penalty", INVALID, {"presence_penalty": math.nan}),
    ("presence_penalty", INVALID, {"presence_penalty": "1"}),
    ("frequency_penalty", INVALID, {"frequency_penalty": -2.1}),
    ("frequency_penalty", INVALID, {"frequency_penalty": -math.inf}),
    ("frequency_penalty", INVALID, {"frequency_penalty": False}),
    ("repetition_penalty", INVALID, {"repetition_penalty": 0}),
    ("repetition_penalty", INVALID, {"repetition_penalty": -1}),
    ("repetition_penalty", INVALID, {"repetition_penalty": 101}),
    ("repetition_penalty", INVALID, {"repetition_penalty": math.inf}),
    ("logit_bias", INVALID, {"logit_bias": [1]}),
    ("logit_bias", INVALID, {"logit_bias": {"a": 1}}),
    ("logit_bias", INVALID, {"logit_bias": {"": 1}}),
    ("logit_bias", INVALID, {"logit_bias": {"05": 1}}),
    ("logit_bias", INVALID, {"logit_bias": {"5.0": 1}}),
    ("logit_bias", INVALID, {"logit_bias": {"\ud800": 1}}),
    ("logit_bias", INVALID, {"logit_bias": {"9" * 5000: 1}}),
    ("logit_bias", INVALID, {"logit_bias": {"-1": 1}}),
    ("logit_bias", INVALID, {"logit_bias": {str(VOCAB_SIZE): 1}}),
    ("logit_bias", INVALID, {"logit_bias": {"5": 100.5}}),
    ("logit_bias", INVALID, {"logit_bias": {"5": -101}}),
    ("logit_bias", INVALID, {"logit_bias": {"5": math.nan}}),
    ("logit_bias", INVALID, {"logit_bias": {"5": math.inf}}),
    ("logit_bias", INVALID, {"logit_bias": {"5": "1"}}),
    ("logit_bias", INVALID, {"logit_bias": {"5": True}}),
    ("logit_bias", INVALID, {"logit_bias": {"5": None}}),
    ("logit_bias", INVALID, {"logit_bias": {str(index): 1 for index in range(1025)}}),
    ("stop", INVALID, {"stop": 7}),
    ("stop", INVALID, {"stop": {}}),
    ("stop[0]", INVALID, {"stop": ""}),
    ("stop[1]", INVALID, {"stop": ["a", 7]}),
    ("stop[1]", INVALID, {"stop": ["a", ""]}),
    ("stop[0]", INVALID, {"stop": "\ud800"}),
    ("stop", INVALID, {"stop": ["a"] * 17}),
    ("stop[0]", INVALID, {"stop": "a" * 1025}),
    ("stop[1]", INVALID, {"stop": ["a", "a" * 1025]}),
    ("stop_token_ids", INVALID, {"stop_token_ids": 5}),
    ("stop_token_ids[0]", INVALID, {"stop_token_ids": ["5"]}),
    ("stop_token_ids[1]", INVALID, {"stop_token_ids": [5, 5.5]}),
    ("stop_token_ids", INVALID, {"stop_token_ids": [-1]}),
    ("stop_token_ids", INVALID, {"stop_token_ids": [VOCAB_SIZE]}),
    ("stop_token_ids", INVALID, {"stop_token_ids": [10**30]}),
    ("stop_token_ids", INVALID, {"stop_token_ids": [5] * 129}),
    ("include_stop_str_in_output", INVALID, {"include_stop_str_in_output": 1}),
    ("skip_special_tokens", INVALID, {"skip_special_tokens": "no"}),
    ("return_token_ids", INVALID, {"return_token_ids": 1}),
    ("ignore_eos", INVALID, {"ignore_eos": "yes"}),
    ("add_special_tokens", INVALID, {"add_special_tokens": 1}),
    ("prompt_logprobs", INVALID, {"prompt_logprobs": -1}),
    ("prompt_logprobs", INVALID, {"prompt_logprobs": True}),
    ("prompt_logprobs", INVALID, {"prompt_logprobs": 21}),
    ("prompt_logprobs", INVALID, {"prompt_logprobs": 0, "stream": True}),
    ("truncate_prompt_tokens", INVALID, {"truncate_prompt_tokens": 0}),
    ("truncate_prompt_tokens", INVALID, {"truncate_prompt_tokens": -2}),
    ("truncate_prompt_tokens", INVALID, {"truncate_prompt_tokens": 2.5}),
    ("max_tokens", TOO_LONG, {"truncate_prompt_tokens": -1, "max_tokens": MAX_MODEL_LEN}),
    ("stream", INVALID, {"stream": "yes"}),
    ("stream_options", INVALID, {"stream_options": {"include_usage": True}}),
    ("stream_options", INVALID, {"stream_options": {}, "stream": False}),
    ("stream_options", INVALID, {"stream_options": 7, "stream": True}),
    ("stream_options.include_usage", INVALID, {"stream_options": {"include_usage": 1}, "stream": True}),
    ("stream_options.foo", UNKNOWN, {"stream_options": {"foo": 1}, "stream": True}),
    ("stream_options.\\ud800", UNKNOWN, {"stream_options": {"\ud800": 1}, "stream": True}),
    (
        "stream_options.continuous_usage_stats",
        UNSUPPORTED,
        {"stream_options": {"continuous_usage_stats": True}, "stream": True},
    ),
    ("user", INVALID, {"user": 7}),
    ("user", INVALID, {"user": "\udfff"}),
    ("foo", UNKNOWN, {"foo": 1}),
    ("foo", UNKNOWN, {"foo": None}),
    ("foo", UNKNOWN, {"foo": NEAR_MAX_DEPTH}),
    ("a\\ud800", UNKNOWN, {"a\ud800": 1}),
    ("", UNKNOWN, {"": 1}),
    ("use_beam_search", UNSUPPORTED, {"use_beam_search": True}),
    ("length_penalty", UNSUPPORTED, {"length_penalty": 1.5}),
    ("bad_words", UNSUPPORTED, {"bad_words": ["x"]}),
    ("structured_outputs", UNSUPPORTED, {"structured_outputs": {"choice": ["a", "b"]}}),
    ("guided_json", UNSUPPORTED, {"guided_json": {"type": "object"}}),
    ("guided_regex", UNSUPPORTED, {"guided_regex": "a+"}),
    ("guided_choice", UNSUPPORTED, {"guided_choice": ["a", "b"]}),
    ("guided_grammar", UNSUPPORTED, {"guided_grammar": "root ::= x"}),
    ("return_tokens_as_token_ids", UNSUPPORTED, {"return_tokens_as_token_ids": True}),
    ("cache_salt", UNSUPPORTED, {"cache_salt": "salt"}),
    ("vllm_xargs", UNSUPPORTED, {"vllm_xargs": {"a": 1}}),
    ("kv_transfer_params", UNSUPPORTED, {"kv_transfer_params": {}}),
    ("allowed_token_ids", UNSUPPORTED, {"allowed_token_ids": [5]}),
    ("spaces_between_special_tokens", UNSUPPORTED, {"spaces_between_special_tokens": False}),
    ("priority", UNSUPPORTED, {"priority": 1}),
    ("priority", UNSUPPORTED, {"priority": False}),
    ("response_format", UNSUPPORTED, {"response_format": {"type": "json_object"}}),
    ("response_format", UNSUPPORTED, {"response_format": NEAR_MAX_DEPTH}),
]
COMPLETION: list[Case] = [
    ("prompt", INVALID, {"prompt": None}),
    ("prompt", INVALID, {"prompt": 7}),
    ("prompt", INVALID, {"prompt": []}),
    ("prompt", INVALID, {"prompt": [[]]}),
    ("prompt", INVALID, {"prompt": ["a", 1]}),
    ("prompt", INVALID, {"prompt": ["a", [1]]}),
    ("prompt", INVALID, {"prompt": [1, True]}),
    ("prompt", INVALID, {"prompt": [1.5]}),
    ("prompt", INVALID, {"prompt": [math.nan]}),
    ("prompt", INVALID, {"prompt": [[[1]]]}),
    ("prompt", INVALID, {"prompt": {"a": 1}}),
    ("prompt", INVALID, {"prompt": ["x"] * 257}),
    ("prompt", INVALID, {"prompt": [-1]}),
    ("prompt", INVALID, {"prompt": [[1], [VOCAB_SIZE]]}),
    ("prompt", INVALID, {"prompt": [10**30]}),
    ("prompt", INVALID, {"prompt": "\ud800"}),
    ("prompt", INVALID, {"prompt": "", "add_special_tokens": False}),
    ("prompt", TOO_LONG, {"prompt": "x" * 5000}),
    ("prompt", TOO_LONG, {"prompt": [5] * MAX_MODEL_LEN}),
    ("prompt", TOO_LONG, {"prompt": [5] * 999, "truncate_prompt_tokens": 998}),
    ("n", INVALID, {"n": 128, "prompt": ["x"] * 9}),
    ("best_of", INVALID, {"best_of": 128, "prompt": ["x"] * 9}),
    ("best_of", INVALID, {"best_of": 0}),
    ("best_of", INVALID, {"best_of": 129}),
    ("best_of", INVALID, {"best_of": 2, "n": 3}),
    ("best_of", INVALID, {"best_of": 2, "stream": True}),
    ("best_of", INVALID, {"best_of": "2"}),
    ("echo", INVALID, {"echo": 0}),
    ("echo", INVALID, {"echo": "yes"}),
    ("logprobs", INVALID, {"logprobs": -1}),
    ("logprobs", INVALID, {"logprobs": 21}),
    ("logprobs", INVALID, {"logprobs": True}),
    ("logprobs", INVALID, {"logprobs": 1.0}),
    ("min_tokens", INVALID, {"min_tokens": 17}),
    ("min_tokens", INVALID, {"min_tokens": 1, "max_tokens": 0, "echo": True}),
    ("suffix", UNSUPPORTED, {"suffix": "x"}),
    ("messages", UNKNOWN, {"messages": MESSAGES}),
    ("top_logprobs", UNKNOWN, {"top_logprobs": 1}),
]
CHAT_ONLY: list[Case] = [
    ("messages", INVALID, {"messages": []}),
    ("messages", INVALID, {"messages": None}),
    ("messages", INVALID, {"messages": "hello"}),
    ("messages", INVALID, {"messages": {}}),
    ("messages[0]", INVALID, {"messages": ["hello"]}),
    ("messages[0].role", INVALID, {"messages": [{"role": "robot", "content": "x"}]}),
    ("messages[0].role", INVALID, {"messages": [{"role": "tool", "content": "x"}]}),
    ("messages[0].role", INVALID, {"messages": [{"role": None, "content": "x"}]}),
    ("messages[0].role", INVALID, {"messages": [{"role": [], "content": "x"}]}),
    ("messages[0].role", MISSING, {"messages": [{"content": "x"}]}),
    ("messages[1].content", MISSING, {"messages": [*MESSAGES, {"role": "user"}]}),
    ("messages[0].content", INVALID, {"messages": [{"role": "user", "content": None}]}),
    ("messages[0].content", INVALID, {"messages": [{"role": "user", "content": 7}]}),
    ("messages[0].content", INVALID, {"messages": [{"role": "user", "content": []}]}),
    ("messages[0].content", INVALID, {"messages": [{"role": "user", "content": "\udfff"}]}),
    ("messages[0].content", INVALID, {"messages": [{"role": "user", "content": ["x"]}]}),
    ("messages[0].content", INVALID, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    (
        "messages[0].content",
        INVALID,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    ),
    ("messages[0].content", INVALID, {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}),
    (
        "messages[0].content",
        INVALID,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]},
    ),
    ("messages[0].tool_calls", UNSUPPORTED, {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}),
    ("messages[0].name", INVALID, {"messages": [{"role": "user", "content": "x", "name": "\ud800"}]}),
    ("messages[0].\\ud800", UNKNOWN, {"messages": [{"role": "user", "content": "x", "\ud800": 1}]}),
    ("messages[0].foo", UNKNOWN, {"messages": [{"role": "user", "content": "x", "foo": 1}]}),
    ("messages", TOO_LONG, {"messages": [{"role": "user", "content": "x" * 5000}]}),
    ("safety_identifier", INVALID, {"safety_identifier": "\ud800"}),
    ("prompt_cache_key", INVALID, {"prompt_cache_key": "\ud800"}),
    ("max_completion_tokens", INVALID, {"max_completion_tokens": 0}),
    ("max_completion_tokens", TOO_LONG, {"max_completion_tokens": 10_000}),
    ("max_completion_tokens", INVALID, {"max_completion_tokens": 1, "max_tokens": 2}),
    ("logprobs", INVALID, {"logprobs": 1}),
    ("top_logprobs", INVALID, {"top_logprobs": 3}),
    ("top_logprobs", INVALID, {"top_logprobs": 3, "logprobs": False}),
    ("top_logprobs", INVALID, {"top_logprobs": 21, "logprobs": True}),
    ("top_logprobs", INVALID, {"top_logprobs": -1, "logprobs": True}),
    ("add_generation_prompt", INVALID, {"add_generation_prompt": 1}),
    ("continue_final_message", INVALID, {"continue_final_message": "x"}),
    ("continue_final_message", INVALID, {"continue_final_message": True}),
    ("chat_template_kwargs", INVALID, {"chat_template_kwargs": [1]}),
    ("chat_template_kwargs", INVALID, {"chat_template_kwargs": {"a": ["\ud800"]}}),
    ("chat_template_kwargs.messages", INVALID, {"chat_template_kwargs": {"messages": []}}),
    ("echo", UNSUPPORTED, {"echo": True}),
    ("best_of", UNSUPPORTED, {"best_of": 2}),
    ("chat_template", UNSUPPORTED, {"chat_template": "x"}),
    ("documents", UNSUPPORTED, {"documents": [{}]}),
    ("tools", UNSUPPORTED, {"tools": [{"type": "function"}]}),
    ("tool_choice", UNSUPPORTED, {"tool_choice": "required"}),
    ("functions", UNSUPPORTED, {"functions": [{}]}),
    ("store", UNSUPPORTED, {"store": True}),
    ("modalities", UNSUPPORTED, {"modalities": ["text", "audio"]}),
    ("reasoning_effort", UNSUPPORTED, {"reasoning_effort": "high"}),
    ("web_search_options", UNSUPPORTED, {"web_search_options": {}}),
    ("prompt", UNKNOWN, {"prompt": "x"}),
]
REFUSED = [
    *((COMPLETIONS, {"prompt": "x"}, *case) for case in (*COMMON, *COMPLETION)),
    *((CHAT, {"messages": MESSAGES}, *case) for case in (*COMMON, *CHAT_ONLY)),
    (COMPLETIONS, {}, "prompt", MISSING, {}),
    (CHAT, {}, "messages", MISSING, {}),
]


def label(value: object) -> str:
    return f"{value!r:.60}"


def names(error: dict[str, Any], param: str) -> bool:
    """Return whether the message is about `param` and no other field."""
    starts = {
        "context_length_exceeded": f"This model's maximum context length is {MAX_MODEL_LEN} tokens; ",
        "unknown_parameter": f"Unrecognized request argument supplied: {param}.",
        "missing_required_parameter": f"Missing required parameter: {param}.",
        "model_not_found": "The model ",
    }
    message: str = error["message"]
    return message.startswith(starts.get(error["code"], f"{param}: "))


@pytest.mark.parametrize(("path", "base", "param", "code", "changed"), REFUSED, ids=label)
def test_bad_input_gets_a_4xx_that_names_the_field(
    idle_server: RunningServer, path: str, base: dict[str, Any], param: str, code: str, changed: dict[str, Any]
) -> None:
    error = refusal(idle_server, path, body_of(base, changed), 404 if code == NO_MODEL else 400)
    assert (error["param"], error["code"]) == (param, code)
    assert names(error, param)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"])
def test_a_number_that_is_not_finite_is_refused_however_it_is_written(
    idle_server: RunningServer, field: str, number: str
) -> None:
    error = refusal(idle_server, COMPLETIONS, f'{{"prompt": "x", "{field}": {number}}}'.encode())
    assert (error["param"], error["code"]) == (field, INVALID)


@pytest.mark.parametrize(
    ("option", "path", "field", "allowed", "refused"),
    [
        ("max_prompts", COMPLETIONS, "prompt", ["x"] * 2, ["x"] * 3),
        ("max_choices", COMPLETIONS, "n", 2, 3),
        ("max_choices", COMPLETIONS, "best_of", 2, 3),
        ("max_choices", CHAT, "n", 2, 3),
        ("max_sequences", COMPLETIONS, "n", 2, 3),
        ("max_sequences", CHAT, "n", 2, 3),
        ("max_logprobs", COMPLETIONS, "logprobs", 2, 3),
        ("max_logprobs", COMPLETIONS, "prompt_logprobs", 2, 3),
        ("max_logprobs", CHAT, "top_logprobs", 2, 3),
        ("max_logit_bias", CHAT, "logit_bias", {"1": 1, "2": 1}, {"1": 1, "2": 1, "3": 1}),
        ("max_stop_strings", CHAT, "stop", ["a", "b"], ["a", "b", "c"]),
        ("max_stop_length", CHAT, "stop", "aa", "aaa"),
        ("max_stop_token_ids", CHAT, "stop_token_ids", [1, 2], [1, 2, 3]),
    ],
)
def test_whoever_serves_sets_the_limits(
    model: Path, option: str, path: str, field: str, allowed: Any, refused: Any
) -> None:
    base: dict[str, Any] = {"prompt": "x"} if path == COMPLETIONS else {"messages": MESSAGES, "logprobs": True}
    options: dict[str, Any] = {option: 2}
    with running_server(model, **options) as server:
        error = refusal(server, path, body_of(base, {field: refused}))
        assert post(server, path, {**base, field: allowed}).status_code == 200
    assert error["param"].startswith(field)
    assert " 3 " in error["message"]
    assert " 2 " in error["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_body"),
        (b"[1]", "invalid_body"),
        (b'"x"', "invalid_body"),
        (b"null", "invalid_body"),
        (b"7", "invalid_body"),
        (b"NaN", "invalid_body"),
        (b"{", "invalid_json"),
        (b"{'prompt': 'x'}", "invalid_json"),
        (b'{"prompt": "x",}', "invalid_json"),
        (b'{"prompt": "x"} {}', "invalid_json"),
        (b"\xff", "invalid_json"),
        (b"\x00", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"metadata":' + b'{"a":' * 50_000, "invalid_json"),
        (b'{"seed": 1' + b"0" * 9999 + b"}", "invalid_json"),
    ],
)  # fmt: skip
def test_a_body_that_is_no_json_object_gets_a_400(
    idle_server: RunningServer, path: str, body: bytes, code: str
) -> None:
    error = refusal(idle_server, path, body)
    assert (error["param"], error["code"]) == (None, code)


@pytest.mark.parametrize(
    ("body", "content_type", "problem"),
    [
        (b"", "application/json", "The body must be a JSON object; it is empty, or null."),
        (b"[]", "application/json", "The body must be a JSON object."),
        (b"{}", "text/plain", "The body must be sent with content-type application/json."),
        (b"{}", "", "The body must be sent with content-type application/json."),
    ],
)
def test_what_is_wrong_with_a_whole_body_is_said(
    idle_server: RunningServer, body: bytes, content_type: str, problem: str
) -> None:
    headers = {"content-type": content_type} if content_type else {}
    answer = httpx.post(idle_server.url + COMPLETIONS, content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == problem


def test_too_long_a_number_is_refused_without_advice_for_programmers(idle_server: RunningServer) -> None:
    message = refusal(idle_server, COMPLETIONS, b'{"prompt": "x", "seed": 1' + b"0" * 9999 + b"}")["message"]
    assert "4300 digits" in message
    assert "sys." not in message


@pytest.mark.parametrize("stop", ["", ["a", ""]])
def test_a_stop_string_must_not_be_empty(idle_server: RunningServer, stop: object) -> None:
    error = refusal(idle_server, COMPLETIONS, body_of({"prompt": "x"}, {"stop": stop}))
    assert error["message"].endswith("]: must not be empty.")


def test_of_a_key_that_is_written_twice_the_last_counts(idle_server: RunningServer) -> None:
    error = refusal(idle_server, COMPLETIONS, b'{"prompt": "x", "n": 1, "n": 0}')
    assert error["param"] == "n"


def test_a_key_that_is_no_text_is_said_to_be_unknown(idle_server: RunningServer) -> None:
    error = refusal(idle_server, COMPLETIONS, b'{"prompt": "x", "a\\ud800": 1}')
    assert error["code"] == "unknown_parameter"
    assert error["message"] == "Unrecognized request argument supplied: a\\ud800."


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ('"image_url"', "'image_url'"),
        (f'"{"x" * 1000}"', f"'{'x' * 40}…'"),
        ('"\\ud800"', repr("\\ud800")),
        ("7", "a number"),
        ("null", "null"),
        ("[" * 800 + "]" * 800, "a list"),
        ('{"a":' * 800 + "1" + "}" * 800, "an object"),
    ],
    ids=["short", "long", "no text", "number", "null", "deep list", "deep object"],
)
def test_of_a_wrong_type_of_part_no_more_is_shown_than_helps(idle_server: RunningServer, kind: str, shown: str) -> None:
    body = f'{{"messages": [{{"role": "user", "content": [{{"type": {kind}}}]}}]}}'
    error = refusal(idle_server, CHAT, body.encode())
    assert error["message"] == f"messages[0].content: the type of part 0 is {shown}; only 'text' is supported."


def test_a_part_is_refused_however_deep_its_type_is(idle_server: RunningServer) -> None:
    for depth in range(930, 1000):  # about where JSON begins to be too deep
        body = f'{{"messages": [{{"role": "user", "content": [{{"type": {"[" * depth + "]" * depth}}}]}}]}}'
        refusal(idle_server, CHAT, body.encode())


def test_a_part_without_a_type_is_refused(idle_server: RunningServer) -> None:
    error = refusal(idle_server, CHAT, b'{"messages": [{"role": "user", "content": [{"text": "a"}]}]}')
    assert "the type of part 0 is missing" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a", "x" * 1000: 1},
        {"prompt": "a", "logit_bias": {"x" * 1000: 1}},
        {"prompt": [10**1000]},
        {"prompt": "a", "stop_token_ids": [10**1000]},
    ],
    ids=["key", "token id in logit_bias", "token id", "stop token"],
)
def test_what_is_long_is_shown_shortened(idle_server: RunningServer, body: dict[str, Any]) -> None:
    assert len(refusal(idle_server, COMPLETIONS, body_of(body, {}))["message"]) < 200


def test_a_context_too_long_is_refused_with_the_numbers(idle_server: RunningServer) -> None:
    error = refusal(idle_server, COMPLETIONS, body_of({"prompt": [5] * 200}, {"max_tokens": 100}))
    assert error["code"] == "context_length_exceeded"
    assert all(number in error["message"] for number in ("200", "100", str(MAX_MODEL_LEN)))


def test_unknown_urls_and_methods_answer_in_the_same_shape(idle_server: RunningServer) -> None:
    missing, method = httpx.get(f"{idle_server.url}/v2"), httpx.get(idle_server.url + CHAT)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_url")
    assert (method.status_code, method.json()["error"]["code"]) == (405, "method_not_supported")
    assert httpx.get(f"{idle_server.url}/v1/models/other").json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/ready/", "/health/", "/docs/assets", "/v1/completions/"])
def test_a_slash_too_many_or_few_is_another_url(idle_server: RunningServer, path: str) -> None:
    answer = httpx.get(idle_server.url + path, headers={"host": "evil.example"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
    assert "location" not in answer.headers


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
