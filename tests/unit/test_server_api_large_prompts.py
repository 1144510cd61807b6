"""Large prompts hold nobody up."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from tokenizers import AddedToken

from tests.unit.server_support import (
    CHAT,
    COMPLETIONS,
    RunningServer,
    byte_level_tokenizer,
    post,
    refusal,
    running_server,
    write_model,
)

LONG_PROMPT = "ab 1\n" * 500_000  # 2.5 MB, some seconds to tokenize


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
        arrival = time.monotonic()
        large = pool.submit(post, server, COMPLETIONS, {"prompt": LONG_PROMPT})
        while not large.done():
            begin = time.monotonic()
            client.get(f"{server.url}/health").raise_for_status()
            waits.append(time.monotonic() - begin)
            time.sleep(0.05)
        whole = time.monotonic() - arrival
        error = large.result().json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "at least" not in error["message"]
    assert max(waits) < whole / 2


def test_a_prompt_being_tokenized_gets_503_when_the_service_ends(slow_tokenizer_server: RunningServer) -> None:
    server = slow_tokenizer_server
    with ThreadPoolExecutor(3) as pool:
        large = [pool.submit(post, server, COMPLETIONS, {"prompt": LONG_PROMPT}) for _ in range(3)]
        time.sleep(0.5)
        server.fail("The server is shutting down.")
        answers = [future.result() for future in large]
    assert [answer.status_code for answer in answers] == [503] * 3
    assert {answer.json()["error"]["message"] for answer in answers} == {"The server is shutting down."}


MILLION = 10**6
FEW = 60_000


def _many(item: str, count: int = MILLION) -> str:
    return "[" + ",".join([item] * count) + "]"


MEMBERS = "{" + ",".join(f'"{key}": 1' for key in range(MILLION // 2)) + "}"
WRONG_BODIES: dict[str, tuple[str, str, str]] = {  # path, body, the field that the error names
    "stop strings": (COMPLETIONS, f'{{"prompt": "a", "stop": {_many("1")}}}', "stop"),
    "fewer stop strings": (COMPLETIONS, f'{{"prompt": "a", "stop": {_many("1", FEW)}}}', "stop[0]"),
    "stop tokens": (COMPLETIONS, f'{{"prompt": "a", "stop_token_ids": {_many("null")}}}', "stop_token_ids"),
    "fewer stop tokens": (
        COMPLETIONS,
        f'{{"prompt": "a", "stop_token_ids": {_many("null", FEW)}}}',
        "stop_token_ids[0]",
    ),
    "biases": (COMPLETIONS, f'{{"prompt": "a", "logit_bias": {MEMBERS}}}', "logit_bias"),
    "prompts": (COMPLETIONS, f'{{"prompt": {_many("[1]")}}}', "prompt"),
    "messages": (CHAT, f'{{"messages": {_many("{}")}}}', "messages"),
    "fewer messages": (CHAT, f'{{"messages": {_many("{}", FEW)}}}', "messages[0].role"),
    "messages to count": ("/tokenize", f'{{"messages": {_many("{}")}}}', "messages"),
    "parts": (CHAT, f'{{"messages": [{{"role": "user", "content": {_many("{}")}}}]}}', "messages[0].content"),
    "tokens": ("/detokenize", f'{{"tokens": {_many("null")}}}', "tokens[0]"),
    "more tokens": ("/detokenize", f'{{"tokens": {_many("1", 5 * MILLION)}}}', "tokens"),
    "unknown keys": (COMPLETIONS, MEMBERS, "0"),
    "unknown keys in a message": (CHAT, f'{{"messages": [{MEMBERS}]}}', "messages[0].0"),
}


@pytest.mark.parametrize("name", WRONG_BODIES)
def test_of_a_million_wrong_things_one_is_named_and_others_are_answered(idle_server: RunningServer, name: str) -> None:
    path, body, param = WRONG_BODIES[name]
    with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=30) as client:
        wrong = pool.submit(refusal, idle_server, path, body.encode())
        while not wrong.done():
            client.get(f"{idle_server.url}/health").raise_for_status()
        assert wrong.result()["param"] == param
