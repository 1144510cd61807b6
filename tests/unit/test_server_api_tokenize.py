"""`POST /tokenize` and `/detokenize`."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from server.service import LONG_TEXT
from tests.tokenizers import CORPUS, FAMILIES, Family
from tests.unit.server_support import (
    BOS,
    CHAT,
    COMPLETIONS,
    EOS,
    MAX_MODEL_LEN,
    MESSAGES,
    TOKENIZER,
    VOCAB_SIZE,
    RunningServer,
    post,
    running_server,
    write_model,
)

TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
LONG_PROMPT = "ab 1\n" * 200_000  # about a second to tokenize


def error(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 400
    found: dict[str, Any] = response.json()["error"]
    return found


def test_a_prompt_becomes_framed_tokens(idle_server: RunningServer) -> None:
    ids = TOKENIZER.encode("the quick é").ids
    assert post(idle_server, TOKENIZE, {"prompt": "the quick é", "model": "scripted"}).json() == {
        "count": len(ids),
        "max_model_len": MAX_MODEL_LEN,
        "tokens": ids,
        "token_strs": None,
    }


def test_the_frame_can_be_left_out(idle_server: RunningServer) -> None:
    tokens = post(idle_server, TOKENIZE, {"prompt": "the quick", "add_special_tokens": False}).json()["tokens"]
    assert tokens == TOKENIZER.encode("the quick", add_special_tokens=False).ids


def test_tokens_come_as_the_vocabulary_spells_them(idle_server: RunningServer) -> None:
    answer = post(idle_server, TOKENIZE, {"prompt": "the dog", "return_token_strs": True}).json()
    assert answer["token_strs"] == TOKENIZER.encode("the dog").tokens
    assert answer["token_strs"][:2] == [BOS, "the"]


def test_an_empty_prompt_has_the_frame_alone(idle_server: RunningServer) -> None:
    assert post(idle_server, TOKENIZE, {"prompt": ""}).json()["tokens"] == TOKENIZER.encode("").ids
    assert post(idle_server, TOKENIZE, {"prompt": "", "add_special_tokens": False}).json()["count"] == 0


def test_a_conversation_has_the_tokens_that_the_engine_would_get(server: RunningServer) -> None:
    post(server, CHAT, {"messages": MESSAGES}).raise_for_status()
    (request,) = server.engine.requests
    assert post(server, TOKENIZE, {"messages": MESSAGES}).json()["tokens"] == request.prompt_token_ids


def longest_wait_meanwhile(server: RunningServer, path: str, body: object) -> tuple[float, httpx.Response]:
    """Return the longest that anything else waited for an answer, as a share of this request's time; and its answer."""
    waits = [0.0]
    with ThreadPoolExecutor(1) as pool, httpx.Client() as client:
        begin = time.perf_counter()
        answer = pool.submit(post, server, path, body)
        while not answer.done():
            asked = time.perf_counter()
            client.get(f"{server.url}/health").raise_for_status()
            waits.append(time.perf_counter() - asked)
            time.sleep(0.005)
        return max(waits) / (time.perf_counter() - begin), answer.result()


def test_a_text_longer_than_the_context_is_counted_while_others_are_answered(idle_server: RunningServer) -> None:
    share, answer = longest_wait_meanwhile(idle_server, TOKENIZE, {"prompt": LONG_PROMPT})
    assert share < 0.75
    assert answer.json()["count"] == len(TOKENIZER.encode(LONG_PROMPT).ids)


@pytest.fixture
def slow_template_server(tmp_path: Path) -> Iterator[RunningServer]:
    """Takes half a second for any conversation."""
    (write_model(tmp_path) / "chat_template.jinja").write_text(
        "{% for _ in range(99999) %}{% for _ in range(30) %}{% endfor %}{% endfor %}{{ note }}"
    )
    with running_server(tmp_path, ready=False) as server:
        yield server


@pytest.mark.parametrize("long", ["messages", "text", "variables"])
def test_others_are_answered_while_a_long_conversation_is_rendered(
    slow_template_server: RunningServer, long: str
) -> None:
    bodies = {
        "messages": {"messages": MESSAGES * 1000},
        "text": {"messages": [{"role": "user", "content": "x" * LONG_TEXT}]},
        "variables": {"messages": MESSAGES, "chat_template_kwargs": {"note": "x" * LONG_TEXT}},
    }
    share, _ = longest_wait_meanwhile(slow_template_server, TOKENIZE, bodies[long])
    assert share < 0.75


def test_a_template_that_does_not_end_is_the_conversations_error(
    slow_template_server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.text.chat_template.MAX_RENDER_SECONDS", 0.01)
    found = error(post(slow_template_server, TOKENIZE, {"messages": MESSAGES}))
    assert found["param"] == "messages"
    assert "not done after" in found["message"]


def test_tokens_become_text_with_control_tokens_written_out(idle_server: RunningServer) -> None:
    ids = TOKENIZER.encode("the 🙂 dog").ids
    assert post(idle_server, DETOKENIZE, {"tokens": ids, "model": "scripted"}).json() == {"prompt": f"{BOS}the 🙂 dog"}


def test_many_tokens_become_text(idle_server: RunningServer) -> None:
    ids = TOKENIZER.encode("lazy dog " * LONG_TEXT, add_special_tokens=False).ids
    assert len(ids) > LONG_TEXT
    assert post(idle_server, DETOKENIZE, {"tokens": ids}).json() == {"prompt": "lazy dog " * LONG_TEXT}


def test_ids_that_only_fill_up_the_vocabulary_have_no_text(idle_server: RunningServer) -> None:
    assert post(idle_server, DETOKENIZE, {"tokens": [VOCAB_SIZE - 1]}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("tokens", "param"),
    [
        ([], "tokens"),
        ([-1], "tokens"),
        ([5, VOCAB_SIZE], "tokens"),
        ([2**70], "tokens"),
        ([5, "6"], "tokens[1]"),
        ([5.0], "tokens[0]"),
        ([True], "tokens[0]"),
        ([[5]], "tokens[0]"),
        ("5", "tokens"),
        (5, "tokens"),
        (None, "tokens"),
    ],
)
def test_tokens_that_are_none_are_named(idle_server: RunningServer, tokens: object, param: str) -> None:
    assert error(post(idle_server, DETOKENIZE, {"tokens": tokens}))["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "a", "messages": MESSAGES}, "messages"),
        ({"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt"),
        ({"prompt": "a", "continue_final_message": True}, "continue_final_message"),
        ({"prompt": "a", "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
        ({"prompt": "a", "add_special_tokens": "yes"}, "add_special_tokens"),
        ({"prompt": "a", "max_tokens": 5}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": MESSAGES, "continue_final_message": True}, "continue_final_message"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"unknown": 1}}, "chat_template_kwargs.unknown"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"\ud800": 1}}, "chat_template_kwargs"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"x": ["\ud800"]}}, "chat_template_kwargs"),
        ({"messages": MESSAGES, "tools": [{}]}, "tools"),
        ({"messages": MESSAGES, "chat_template": "x"}, "chat_template"),
    ],
)
def test_what_cannot_be_tokenized_is_named(idle_server: RunningServer, body: object, param: str) -> None:
    raw = json.dumps(body)  # with surrogates as escapes
    found = error(httpx.post(idle_server.url + TOKENIZE, content=raw, headers={"content-type": "application/json"}))
    assert found["param"] == param
    assert param in found["message"]


@pytest.mark.parametrize("path", [TOKENIZE, DETOKENIZE])
def test_another_model_is_not_served(idle_server: RunningServer, path: str) -> None:
    response = post(
        idle_server, path, {"prompt": "a", "model": "x"} if path == TOKENIZE else {"tokens": [1], "model": "x"}
    )
    assert (response.status_code, response.json()["error"]["param"]) == (404, "model")


def test_neutral_values_say_nothing(idle_server: RunningServer) -> None:
    neutral = {"add_generation_prompt": True, "continue_final_message": False, "chat_template_kwargs": {}, "tools": []}
    plain = post(idle_server, TOKENIZE, {"prompt": "a"}).json()
    assert post(idle_server, TOKENIZE, {"prompt": "a", "messages": None, "model": None, **neutral}).json() == plain


def test_text_is_tokenized_while_the_model_is_still_loading(model: Path) -> None:
    with running_server(model, ready=False) as server:
        ids = TOKENIZER.encode("lazy dog").ids
        answer = post(server, TOKENIZE, {"prompt": "lazy dog"}).json()
        assert (answer["tokens"], answer["max_model_len"]) == (ids, None)
        assert post(server, TOKENIZE, {"messages": MESSAGES}).json()["count"] > 0
        assert post(server, TOKENIZE, {"prompt": LONG_PROMPT}).json()["count"] > LONG_TEXT
        assert post(server, DETOKENIZE, {"tokens": ids}).json() == {"prompt": f"{BOS}lazy dog"}
        assert post(server, COMPLETIONS, {"prompt": "lazy dog"}).status_code == 503


def test_the_schema_describes_both(idle_server: RunningServer) -> None:
    paths = httpx.get(f"{idle_server.url}/openapi.json").json()["paths"]
    for path in (TOKENIZE, DETOKENIZE):
        assert paths[path]["post"]["responses"].keys() == {"200", "400", "404", "413", "503"}


# --- published formats -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["Llama 2", "Qwen 3"])
def family(request: pytest.FixtureRequest) -> Family:
    family = FAMILIES[request.param]()
    family.tokenizer.add_special_tokens([EOS])  # the scripted engine's
    return family


@pytest.fixture(scope="module")
def family_server(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory = write_model(tmp_path_factory.mktemp("family"))
    family.write(directory)
    with running_server(directory, ready=False) as server:
        yield server


def test_text_goes_there_and_back(family_server: RunningServer) -> None:
    for text in CORPUS:
        tokens = post(family_server, TOKENIZE, {"prompt": text, "add_special_tokens": False}).json()["tokens"]
        assert post(family_server, DETOKENIZE, {"tokens": tokens}).json() == {"prompt": text}


def test_a_message_that_goes_on_has_the_tokens_that_transformers_gives_it(
    family: Family, family_server: RunningServer, tmp_path: Path
) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(family.write(tmp_path))
    messages = [*MESSAGES, {"role": "assistant", "content": "Sure, it is <think>"}]
    body = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}
    expected = theirs.apply_chat_template(messages, tokenize=True, continue_final_message=True, return_dict=False)
    assert post(family_server, TOKENIZE, body).json()["tokens"] == expected


def test_the_templates_own_variables_reach_it(family: Family, family_server: RunningServer) -> None:
    counts = [
        post(family_server, TOKENIZE, {"messages": MESSAGES, "chat_template_kwargs": kwargs}).json()["count"]
        for kwargs in ({}, family.kwargs)
    ]
    assert (counts[0] != counts[1]) == bool(family.kwargs)
