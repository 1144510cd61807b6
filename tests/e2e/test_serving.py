"""The whole path on the embedded model: HTTP, two ranks, text."""

import json
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
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
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

    before = aborted()
    body = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": streamed, "n": 8}
    with httpx.Client(timeout=httpx.Timeout(120, read=0.5 if not streamed else 120)) as client:
        if streamed:
            with client.stream("POST", f"{service.url}/v1/completions", json=body) as response:
                next(response.iter_raw())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{service.url}/v1/completions", json=body)
    wait_until(lambda: aborted() == before + 8, 1)
    wait_until(lambda: service.metric("ryzanstein_kv_cache_used_blocks") == 0, 5)


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
    wait_until(lambda: service.metric("ryzanstein_num_requests_running") == 0, 5)
    assert service.complete(prompt="x", max_tokens=4)["finish_reason"] in ("length", "stop")


def test_collectives_and_memory_of_both_ranks_are_measured(service: ServiceProcess) -> None:
    service.complete(prompt="x", max_tokens=4)
    for rank in ("0", "1"):
        labels = f'operation="all_reduce",rank="{rank}"'
        wait_until(partial(lambda labels: service.metric("ryzanstein_collective_seconds_count", labels) > 0, labels), 5)
        assert service.metric("ryzanstein_rank_memory_bytes", f'kind="resident",rank="{rank}"') > 1 << 20
