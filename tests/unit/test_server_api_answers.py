"""What the API answers before a scripted engine: OpenAI's shapes, whole and streamed, and to its official client."""

import json
import time

import httpx
import openai
import pytest

from tests.unit.server_support import (
    CHAT,
    COMPLETIONS,
    EOS,
    MAX_MODEL_LEN,
    MESSAGES,
    TOKENIZER,
    RunningServer,
    events,
    post,
)


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
        "choices": [{"index": 0, "text": "lazy dog", "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": prompt_tokens // 2},
        },
    }


def test_usage_counts_a_prompt_once_and_each_choices_tokens(server: RunningServer) -> None:
    fields = {"prompt": [[5] * 10, [6] * 4], "n": 3, "max_tokens": 7, "ignore_eos": True}
    usage = post(server, COMPLETIONS, fields).json()["usage"]
    assert usage == {
        "prompt_tokens": 14,
        "completion_tokens": 42,
        "total_tokens": 56,
        "prompt_tokens_details": {"cached_tokens": 7},
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
                "stop_reason": None,
            }
        ],
    }


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_token_ids_come_whole_and_in_streams(server: RunningServer, path: str) -> None:
    server.engine.script = lambda _: "lazy dog"
    ids = [*TOKENIZER.encode("lazy dog", add_special_tokens=False).ids, TOKENIZER.token_to_id(EOS)]
    body = {"max_tokens": 20, "return_token_ids": True, "stop": "dog"}  # the tokens of a stop string were sampled too
    body |= {"prompt": "x"} if path == COMPLETIONS else {"messages": MESSAGES}
    answer = post(server, path, body).json()
    prompt = server.engine.requests[0].prompt_token_ids
    place = answer["choices"][0] if path == COMPLETIONS else answer
    assert place["prompt_token_ids"] == prompt
    assert answer["choices"][0]["token_ids"] == ids[:-1]
    chunks = [json.loads(event) for event in events(post(server, path, {**body, "stream": True}))[:-1]]
    places = [chunk["choices"][0] if path == COMPLETIONS else chunk for chunk in chunks]
    assert [place.get("prompt_token_ids") for place in places] == [prompt, *[None] * (len(chunks) - 1)]
    assert [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])] == ids[:-1]


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
