"""The whole path on the embedded model: HTTP, two ranks, text."""

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import openai
import pytest

from tests.service_process import ServiceProcess, wait_until

PROMPTS = ["def is_prime(n):\n", "import os\n\n", "class Stack:\n", "for line in "]
MODEL = "ryzanstein-embedded"


@pytest.fixture(scope="module")
def service() -> Iterator[ServiceProcess]:
    with ServiceProcess(
        "-tp", "2", "--dtype", "float32", "--num-kv-blocks", "512", "--max-num-batched-tokens", "512"
    ) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: ServiceProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def stream(service: ServiceProcess, prompt: str, max_tokens: int) -> str:
    text = ""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=120) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == "length"
    for choice in choices:
        text += choice["text"]
    return text


def test_two_ranks_are_ready_and_shown(service: ServiceProcess) -> None:
    ready = httpx.get(f"{service.url}/ready").json()
    assert ready["state"] == "READY"
    assert [rank["rank"] for rank in ready["ranks"]] == [0, 1]
    assert len({rank["pid"] for rank in ready["ranks"]} | {service.process.pid}) == 3
    assert all(str(rank["pid"]) in service.stderr for rank in ready["ranks"])
    assert MODEL in service.stderr


def test_streamed_and_whole_greedy_text_are_the_same(service: ServiceProcess) -> None:
    for prompt in PROMPTS:
        whole = service.complete(prompt=prompt, max_tokens=40, temperature=0, ignore_eos=True)
        assert whole["text"]
        assert stream(service, prompt, 40) == whole["text"]


def test_many_streams_at_once_all_end_with_their_text_and_leave_no_block(service: ServiceProcess) -> None:
    checks = service.metric("ryzanstein_integrity_checks_total")
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda index: stream(service, PROMPTS[index % len(PROMPTS)], 24), range(16)))
    assert all(texts)
    service.wait_until_idle(checks)
    assert service.metric("ryzanstein_num_requests_running") == service.metric("ryzanstein_num_requests_waiting") == 0


def test_the_official_client_works_end_to_end(client: openai.OpenAI) -> None:
    assert [card.id for card in client.models.list().data] == [MODEL]
    several = client.completions.create(model=MODEL, prompt="x = ", n=3, seed=7, temperature=1, max_tokens=12)
    again = client.completions.create(model=MODEL, prompt="x = ", n=3, seed=7, temperature=1, max_tokens=12)
    texts = [choice.text for choice in several.choices]
    assert len(set(texts)) > 1
    assert texts == [choice.text for choice in again.choices]
    assert several.usage is not None
    assert several.usage.completion_tokens <= 36
    messages: Any = [{"role": "user", "content": "Return the sum of a list"}]
    chat = client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=16, temperature=0)
    pieces = client.chat.completions.create(
        model=MODEL, messages=messages, max_completion_tokens=16, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text == chat.choices[0].message.content
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=MODEL, prompt="x", max_tokens=100_000)
    assert error.value.code == "context_length_exceeded"


def test_the_official_client_gets_logprobs_that_agree_however_they_are_asked_for(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 12}
    first = client.completions.create(prompt=PROMPTS[0], logprobs=3, **fields).choices[0]
    assert first.logprobs is not None
    assert first.logprobs.tokens is not None
    assert first.logprobs.token_logprobs is not None
    assert first.logprobs.top_logprobs is not None
    assert first.text == "".join(first.logprobs.tokens)
    for token, own, top in zip(
        first.logprobs.tokens, first.logprobs.token_logprobs, first.logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 3
        assert own == top[token] == max(top.values())  # greedy takes the likeliest
    pieces = list(client.completions.create(prompt=PROMPTS[0], logprobs=3, stream=True, **fields))
    streamed = [piece.choices[0].logprobs.tokens for piece in pieces if piece.choices[0].logprobs is not None]
    assert [token for tokens in streamed for token in tokens or ()] == first.logprobs.tokens
    scored = client.completions.create(
        model=MODEL, prompt=PROMPTS[0] + first.text, max_tokens=0, echo=True, logprobs=0
    ).choices[0]
    assert scored.text == PROMPTS[0] + first.text
    logprobs = scored.model_dump()["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    num_tokens = len(first.logprobs.tokens)
    assert logprobs["tokens"][-num_tokens:] == first.logprobs.tokens
    assert logprobs["token_logprobs"][-num_tokens:] == pytest.approx(first.logprobs.token_logprobs, abs=1e-4)


def test_the_official_client_gets_the_logprobs_of_a_message(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Sort a list"}]
    fields: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0, "logprobs": True}
    choice = client.chat.completions.create(top_logprobs=2, **fields).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    assert all(entry.top_logprobs[0].token == entry.token for entry in choice.logprobs.content)
    tokens = []
    for piece in client.chat.completions.create(stream=True, **fields):
        logprobs = piece.choices[0].logprobs
        tokens += [] if logprobs is None else [entry.token for entry in logprobs.content or ()]
    assert tokens == [entry.token for entry in choice.logprobs.content]


def test_the_best_of_several_are_the_likeliest_of_them(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "prompt": "import ", "max_tokens": 8, "seed": 5, "temperature": 1}
    every = client.completions.create(n=5, logprobs=0, **fields)
    best = client.completions.create(n=2, best_of=5, **fields)

    def mean(choice: Any) -> float:
        found: list[float] = choice.logprobs.token_logprobs
        return sum(found) / len(found)

    ranked = sorted((choice for choice in every.choices), key=mean, reverse=True)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert best.usage is not None
    assert every.usage is not None
    assert best.usage.completion_tokens == every.usage.completion_tokens


def test_a_bias_forces_a_token_and_forbids_one(client: openai.OpenAI, service: ServiceProcess) -> None:
    fields: dict[str, Any] = {"model": MODEL, "prompt": PROMPTS[1], "max_tokens": 6, "temperature": 0}
    plain = service.complete(**fields, return_token_ids=True)["token_ids"]
    forced = client.completions.create(logit_bias={str(plain[3]): 100}, **fields, extra_body={"return_token_ids": True})
    assert forced.choices[0].model_dump()["token_ids"] == [plain[3]] * 6
    forbidden = client.completions.create(
        logit_bias={str(plain[0]): -100}, **fields, extra_body={"return_token_ids": True}
    )
    assert plain[0] not in forbidden.choices[0].model_dump()["token_ids"]


def test_penalties_keep_a_text_from_repeating_itself(client: openai.OpenAI) -> None:
    def distinct(**fields: Any) -> int:
        answer = client.completions.create(
            model=MODEL, prompt="a = 1\na = 1\na = 1\n", max_tokens=40, temperature=0, **fields
        )
        return len(set(answer.choices[0].model_dump()["token_ids"]))

    extra = {"return_token_ids": True, "ignore_eos": True}
    plain = distinct(extra_body=extra)
    assert distinct(presence_penalty=2, extra_body=extra) > plain
    assert distinct(frequency_penalty=2, extra_body=extra) > plain
    assert distinct(extra_body={**extra, "repetition_penalty": 2}) == 40  # of 40


def test_a_stop_token_of_the_requests_own_waits_for_min_tokens(service: ServiceProcess) -> None:
    fields: dict[str, Any] = {"prompt": PROMPTS[0], "max_tokens": 20, "temperature": 0, "return_token_ids": True}
    plain = service.complete(**fields)["token_ids"]
    stopped = service.complete(**fields, stop_token_ids=plain[4:5])
    assert (stopped["token_ids"], stopped["stop_reason"]) == (plain[: plain.index(plain[4]) + 1], plain[4])
    later = service.complete(**fields, stop_token_ids=plain[4:5], min_tokens=10)
    assert len(later["token_ids"]) > 10
    assert plain[4] not in later["token_ids"][:10]


def test_a_prompt_that_is_scored_again_says_the_same_of_each_token(service: ServiceProcess) -> None:
    prompt = "def is_prime(n):\n    for k in range(2, n):\n        if n % k == 0:\n            return False\n"
    answers = [service.complete(prompt=prompt, max_tokens=0, prompt_logprobs=2) for _ in range(2)]
    first, again = (answer["prompt_logprobs"] for answer in answers)
    assert first[0] is None
    assert len(first) > 20
    assert all(len(position) in (2, 3) for position in first[1:])
    for ours, theirs in zip(first[1:], again[1:], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(ours[token]["logprob"] == pytest.approx(theirs[token]["logprob"], abs=1e-4) for token in ours)


def test_a_stop_string_cuts_the_greedy_text(service: ServiceProcess) -> None:
    text = service.complete(prompt=PROMPTS[0], max_tokens=40, temperature=0)["text"]
    middle = len(text) // 2
    stop = text[middle : middle + 3]
    choice = service.complete(prompt=PROMPTS[0], max_tokens=40, temperature=0, stop=stop)
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_goes_away_frees_its_blocks(service: ServiceProcess, streamed: bool) -> None:
    def aborted() -> float:
        return service.metric("ryzanstein_request_success_total", 'finished_reason="abort"')

    def begun() -> float:
        return service.metric("ryzanstein_time_to_first_token_seconds_count")

    def generated() -> float:
        return service.metric("ryzanstein_generation_tokens_total")

    aborted_before, begun_before, generated_before = aborted(), begun(), generated()
    body = json.dumps({"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": streamed, "n": 8}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: begun() == begun_before + 8, 60)
    if not streamed:  # the client of a stream may come back
        wait_until(lambda: aborted() == aborted_before + 8, 1)
    wait_until(lambda: service.metric("ryzanstein_kv_cache_used_blocks") == 0, 30)
    assert generated() - generated_before < 8 * 900  # else it ended by itself


def test_a_wave_of_clients_that_come_and_go_leaves_the_service_whole(service: ServiceProcess) -> None:
    def come_and_go() -> None:
        body = {"prompt": "y", "max_tokens": 300, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=120) as response:
            next(response.iter_raw())

    threads = [threading.Thread(target=come_and_go) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: service.metric("ryzanstein_num_requests_running") == 0, 30)
    assert service.complete(prompt="x", max_tokens=4)["finish_reason"] in ("length", "stop")


def has_measured(service: ServiceProcess, labels: str) -> bool:
    return service.metric("ryzanstein_collective_seconds_count", labels) > 0


def test_collectives_and_memory_of_both_ranks_are_measured(service: ServiceProcess) -> None:
    service.complete(prompt="x", max_tokens=4)
    for rank in ("0", "1"):
        labels = f'operation="all_reduce",rank="{rank}"'
        wait_until(partial(has_measured, service, labels), 30)
        assert service.metric("ryzanstein_rank_memory_bytes", f'kind="resident",rank="{rank}"') > 1 << 20
