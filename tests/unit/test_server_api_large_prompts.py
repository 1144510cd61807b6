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
