"""Log-probabilities and what is built on them, before a scripted engine: shapes, streams, echo, scoring, best_of."""

import json
import math
from typing import Any

import openai
import pytest

from engine.protocol.messages import TokenLogprobs
from server.api.logprobs import LogprobFormat
from server.transcript import LogprobEntry
from tests.unit.server_support import (
    CHAT,
    COMPLETIONS,
    EOS,
    MESSAGES,
    TOKENIZER,
    RunningServer,
    events,
    post,
)

TEXT = "the café dog"
IDS = TOKENIZER.encode(TEXT, add_special_tokens=False).ids
EOS_ID = TOKENIZER.token_to_id(EOS)


def text_of(token: int) -> str:
    return TOKENIZER.decode([token], skip_special_tokens=False)


def completion(server: RunningServer, **fields: Any) -> dict[str, Any]:
    response = post(server, COMPLETIONS, {"prompt": "x", "max_tokens": 40, **fields})
    response.raise_for_status()
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def streamed(server: RunningServer, path: str, **fields: Any) -> list[dict[str, Any]]:
    response = post(server, path, {"max_tokens": 40, **fields, "stream": True})
    return [json.loads(event)["choices"][0] for event in events(response)[:-1]]


def test_a_completions_logprobs_have_openais_shape(server: RunningServer) -> None:
    server.engine.script = lambda _: "ab"
    a, b = TOKENIZER.encode("ab", add_special_tokens=False).ids
    logprobs = completion(server, logprobs=2)["logprobs"]
    top = {text_of(0): 0, text_of(1): -1 / 64}
    assert logprobs == {
        "tokens": ["a", "b"],
        "token_logprobs": [-a / 64, -b / 64],
        "top_logprobs": [{**top, "a": -a / 64}, {**top, "b": -b / 64}],
        "text_offset": [0, 1],
    }


def test_a_messages_logprobs_have_openais_shape(server: RunningServer) -> None:
    server.engine.script = lambda _: "a"
    (a,) = TOKENIZER.encode("a", add_special_tokens=False).ids
    answer = post(server, CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1}).json()
    first = {"token": text_of(0), "logprob": 0, "bytes": list(text_of(0).encode())}
    content = [{"token": "a", "logprob": -a / 64, "bytes": [97], "top_logprobs": [first]}]
    assert answer["choices"][0]["logprobs"] == {"content": content, "refusal": None}


def test_without_top_logprobs_there_are_none(server: RunningServer) -> None:
    answer = post(server, CHAT, {"messages": MESSAGES, "logprobs": True}).json()
    assert all(entry["top_logprobs"] == [] for entry in answer["choices"][0]["logprobs"]["content"])
    own = completion(server, logprobs=0)["logprobs"]
    assert own["top_logprobs"] == [
        {token: value} for token, value in zip(own["tokens"], own["token_logprobs"], strict=True)
    ]


def test_bytes_that_are_no_text_are_written_as_openai_does(server: RunningServer) -> None:
    server.engine.script = lambda _: "é"
    logprobs = completion(server, logprobs=0)["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs["text_offset"] == [0, 0]


def test_minus_infinity_becomes_the_least_number() -> None:
    excluded = TokenLogprobs(5, -math.inf, 9, [6], [-math.inf])
    shown = LogprobFormat({5: b"a", 6: b"b"}, 1).completion([LogprobEntry(5, excluded, 0)])
    assert shown["token_logprobs"] == [-9999.0]
    assert shown["top_logprobs"] == [{"b": -9999.0, "a": -9999.0}]


def test_of_tokens_that_are_written_alike_the_likelier_is_shown() -> None:
    found = TokenLogprobs(7, -3.0, 9, [5, 6], [-1.0, -2.0])
    shown = LogprobFormat({5: b"a", 6: b"a", 7: b"a"}, 2).completion([LogprobEntry(7, found, 0)])
    assert (shown["token_logprobs"], shown["top_logprobs"]) == ([-3.0], [{"a": -1.0}])


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stop": ["fé"]},
        {"stop": ["fé", "og"], "include_stop_str_in_output": True},
        {"stop": "é d", "min_tokens": 2},
        {"skip_special_tokens": False, "include_stop_str_in_output": True},
        {"ignore_eos": True, "skip_special_tokens": False, "max_tokens": 20},
        {"ignore_eos": True, "stop_token_ids": IDS[3:4]},
    ],
)
def test_what_is_streamed_is_the_whole_answer(server: RunningServer, path: str, fields: dict[str, Any]) -> None:
    server.engine.script = lambda _: TEXT
    own: dict[str, Any] = (
        {"prompt": "x", "logprobs": 2} if path == COMPLETIONS else {"messages": MESSAGES, "logprobs": True}
    )
    fields = {"max_tokens": 40, **own, "return_token_ids": True, **fields}
    whole = post(server, path, fields).json()["choices"][0]
    chunks = streamed(server, path, **fields)
    text = [chunk["text"] if path == COMPLETIONS else chunk["delta"].get("content", "") for chunk in chunks]
    assert "".join(text) == (whole["text"] if path == COMPLETIONS else whole["message"]["content"])
    assert [token for chunk in chunks for token in chunk.get("token_ids", [])] == whole["token_ids"]
    assert (chunks[-1]["finish_reason"], chunks[-1]["stop_reason"]) == (whole["finish_reason"], whole["stop_reason"])
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset") if path == COMPLETIONS else ("content",):
        entries = [entry for chunk in chunks if chunk["logprobs"] for entry in chunk["logprobs"][name]]
        assert entries == whole["logprobs"][name]
        assert entries


def test_an_echo_begins_with_the_prompt_whose_first_token_has_no_logprob(server: RunningServer) -> None:
    server.engine.script = lambda _: "fox"
    prompt = TOKENIZER.encode("lazy dog").ids
    choice = completion(server, prompt="lazy dog", echo=True, logprobs=1)
    logprobs = choice["logprobs"]
    assert choice["text"] == "lazy dogfox"
    assert logprobs["token_logprobs"][: len(prompt)] == [None, *(-token / 64 for token in prompt[1:])]
    assert logprobs["top_logprobs"][0] is None
    assert len({len(values) for values in logprobs.values()}) == 1
    for token, offset in zip(logprobs["tokens"][1:], logprobs["text_offset"][1:], strict=True):
        assert choice["text"][offset:].startswith(token)


def test_an_echo_streams_the_prompt_with_the_first_token(server: RunningServer) -> None:
    server.engine.script = lambda _: "fox"
    chunks = streamed(server, COMPLETIONS, prompt=["a", "b"], echo=True, logprobs=0)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk["index"]] += chunk["text"]
    assert texts == ["afox", "bfox"]


def test_no_token_is_wanted_where_the_prompt_is_only_scored(server: RunningServer) -> None:
    response = post(server, COMPLETIONS, {"prompt": "lazy dog", "max_tokens": 0, "echo": True, "logprobs": 1}).json()
    (choice,) = response["choices"]
    prompt = TOKENIZER.encode("lazy dog").ids
    assert (choice["text"], choice["finish_reason"]) == ("lazy dog", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, *(-token / 64 for token in prompt[1:])]
    assert response["usage"]["completion_tokens"] == 0
    assert server.engine.requests[0].sampling.max_tokens == 1


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_prompt_logprobs_have_vllms_shape(server: RunningServer, path: str) -> None:
    own: dict[str, Any] = {"prompt": "lazy"} if path == COMPLETIONS else {"messages": MESSAGES}
    answer = post(server, path, {**own, "max_tokens": 0, "prompt_logprobs": 2, "return_token_ids": True}).json()
    place = answer["choices"][0] if path == COMPLETIONS else answer
    first, *others = place["prompt_logprobs"]
    assert first is None
    assert len(others) == len(place["prompt_token_ids"]) - 1
    for token, shown in zip(place["prompt_token_ids"][1:], others, strict=True):
        assert shown[str(token)] == {"logprob": -token / 64, "rank": token + 1, "decoded_token": text_of(token)}
        assert shown["1"] == {"logprob": -1 / 64, "rank": 2, "decoded_token": text_of(1)}


def test_a_prompt_is_scored_once_for_all_its_choices(server: RunningServer) -> None:
    body = {"prompt": ["lazy", "dog dog"], "n": 2, "max_tokens": 1, "prompt_logprobs": 0}
    choices = post(server, COMPLETIONS, body).json()["choices"]
    assert [request.sampling.prompt_logprobs for request in server.engine.requests] == [0, None, 0, None]
    assert [len(choice["prompt_logprobs"]) for choice in choices] == [
        len(request.prompt_token_ids) for request in server.engine.requests
    ]


def test_text_and_prompt_have_each_as_many_likeliest_tokens_as_were_asked_for(server: RunningServer) -> None:
    choice = completion(server, prompt="lazy dog", echo=True, logprobs=1, prompt_logprobs=3, ignore_eos=True)
    assert all(len(top) <= 2 for top in choice["logprobs"]["top_logprobs"][1:])
    assert all(len(position) == 4 for position in choice["prompt_logprobs"][1:])


def test_each_choice_has_its_own_echo(server: RunningServer) -> None:
    answer = post(server, COMPLETIONS, {"prompt": "lazy", "n": 2, "echo": True, "logprobs": 0}).json()
    for index, choice in enumerate(answer["choices"]):
        assert choice["text"] == f"lazychoice {index}"
        assert None not in choice["logprobs"]["token_logprobs"][1:]


def test_fields_that_nobody_asked_for_are_left_out(server: RunningServer) -> None:
    choice = completion(server)
    assert choice.keys() == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
    chat = post(server, CHAT, {"messages": MESSAGES}).json()
    assert not {"prompt_logprobs", "prompt_token_ids"} & chat.keys()


def test_the_best_are_those_whose_tokens_are_the_likeliest_on_average(server: RunningServer) -> None:
    words = [
        "zzzz",
        "!!",
        "aaaa",
        "!!!!!!!!!!!!",
    ]  # the scripted engine finds low ids likely, and ! is among the lowest
    server.engine.script = lambda request: words[request.sampling.choice_index]
    fields = {"prompt": ["x", "y"], "n": 2, "best_of": 4, "max_tokens": 12, "ignore_eos": True}
    answer = post(server, COMPLETIONS, fields).json()

    def mean(word: str) -> float:
        ids = [*TOKENIZER.encode(word, add_special_tokens=False).ids, EOS_ID or 0]
        sampled = (ids * 12)[:12]
        return sum(-token / 64 for token in sampled) / 12

    best = sorted(words, key=mean, reverse=True)[:2]
    for index, choice in enumerate(answer["choices"]):
        assert choice["index"] == index
        assert choice["text"].startswith(best[index % 2][:2])
        assert choice["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 2 * 4 * 12
    assert [request.sampling.logprobs for request in server.engine.requests] == [0] * 8


def test_best_of_is_n_in_a_stream(server: RunningServer) -> None:
    chunks = streamed(server, COMPLETIONS, prompt="x", n=2, best_of=2)
    assert {chunk["index"] for chunk in chunks} == {0, 1}
    assert {request.sampling.logprobs for request in server.engine.requests} == {None}


def test_the_official_client_reads_logprobs(server: RunningServer, client: openai.OpenAI) -> None:
    server.engine.script = lambda _: "ab"
    completed = client.completions.create(model="scripted", prompt="x", logprobs=1, echo=True)
    assert completed.choices[0].logprobs is not None
    assert completed.choices[0].logprobs.tokens == [*map(text_of, TOKENIZER.encode("x").ids), "a", "b"]
    chat = client.chat.completions.create(model="scripted", messages=MESSAGES, logprobs=True, top_logprobs=2)
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content is not None
    assert [entry.token for entry in chat.choices[0].logprobs.content] == ["a", "b"]
    pieces = client.chat.completions.create(model="scripted", messages=MESSAGES, logprobs=True, stream=True)
    tokens = [
        entry.token
        for piece in pieces
        if piece.choices[0].logprobs is not None
        for entry in piece.choices[0].logprobs.content or ()
    ]
    assert tokens == ["a", "b"]
