"""Many clients at once get what each would get alone."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import coverage
import httpx
import psutil
import pytest
from tokenizers import Tokenizer

from engine.protocol.config import EMBEDDED_MODEL
from tests.oracle import NEAR_TIE, Reference
from tests.service_process import ServiceProcess

NUM_CLIENTS = 64
NUM_TOKENS = 48
IDLE_SECONDS = 30
STARTS = (
    "def is_prime(n):\n",
    "class Queue:\n    def __init__(self):\n",
    "import os\nimport sys\n\n",
    "for name in sorted(names):\n",
    "    def test_empty(self):\n",
    "try:\n    import",
    '"""Utilities for',
    "if __name__ == ",
)


@dataclass(frozen=True)
class Answer:
    text: str
    finish_reason: str
    completion_tokens: int


def prompts() -> list[str]:
    return [f"# {number}\n{STARTS[number % len(STARTS)]}" for number in range(NUM_CLIENTS)]


async def stream(client: httpx.AsyncClient, prompt: str) -> Answer:
    body = {
        "prompt": prompt,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text, reason, tokens = "", "", 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            for choice in event["choices"]:
                text += choice["text"]
                reason = choice["finish_reason"] or reason
            tokens = (event["usage"] or {}).get("completion_tokens", tokens)
    return Answer(text, reason, tokens)


async def stream_all(url: str, concurrency: int) -> list[Answer]:
    seats = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=NUM_CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def one(prompt: str) -> Answer:
            async with seats:
                return await stream(client, prompt)

        return await asyncio.gather(*map(one, prompts()))


def is_near_tie(reference: Reference, tokenizer: Tokenizer, prompt: str, texts: tuple[str, str]) -> bool:
    """Whether the reference's greedy path has a near-tie where the two texts part."""
    ids = tokenizer.encode(prompt).ids
    start = len(ids)
    for _ in range(NUM_TOKENS):
        logits = reference.logits(ids)[-1]
        two_best = logits.topk(2).values
        ids.append(int(logits.argmax()))
        decoded = tokenizer.decode(ids[start:])
        if not all(text.startswith(decoded.rstrip("\N{REPLACEMENT CHARACTER}")) for text in texts):
            return bool(two_best[0] - two_best[1] <= NEAR_TIE * logits.abs().max())
    return False


@pytest.mark.parametrize("tp_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_64_streams_at_once_get_the_text_of_a_lone_request(
    tp_size: int, device: str, tell: Callable[[str], None]
) -> None:
    arguments = ("--dtype", "float32", "--device", device, "-tp", str(tp_size))
    with ServiceProcess(*arguments) as service:
        together = asyncio.run(stream_all(service.url, NUM_CLIENTS))
        alone = asyncio.run(stream_all(service.url, 1))
        service.wait_until_idle()
        assert service.metric("ryzanstein_generation_tokens_total") == 2 * NUM_CLIENTS * NUM_TOKENS
    reference, tokenizer = Reference(Path(EMBEDDED_MODEL)), Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json"))
    near_ties = 0
    for prompt, one, other in zip(prompts(), together, alone, strict=True):
        assert one.finish_reason == other.finish_reason == "length"
        assert one.completion_tokens == other.completion_tokens == NUM_TOKENS
        if one.text != other.text:
            assert is_near_tie(reference, tokenizer, prompt, (one.text, other.text)), (one.text, other.text)
            near_ties += 1
    tell(f"tp {tp_size}: {NUM_CLIENTS} streams of {NUM_TOKENS} tokens, {near_ties} parted at a near-tie")


@pytest.mark.skipif(coverage.Coverage.current() is not None, reason="what measures coverage wakes up twice a second")
def test_an_idle_service_uses_next_to_no_processor_and_wakes_up(device: str, tell: Callable[[str], None]) -> None:
    with ServiceProcess("--device", device, "-tp", "2") as service:
        service.complete(prompt="def f(", max_tokens=4)
        service.wait_until_idle()
        processes = [psutil.Process(service.process.pid), *service.descendants()]
        before = [process.cpu_times() for process in processes]
        asyncio.run(asyncio.sleep(IDLE_SECONDS))
        after = [process.cpu_times() for process in processes]
        used = sum(b.user + b.system - a.user - a.system for a, b in zip(before, after, strict=True))
        tell(f"idle: {used:.2f} s of processor time in {IDLE_SECONDS} s, {len(processes)} processes")
        assert used < 0.01 * IDLE_SECONDS
        assert service.complete(prompt="def f(", max_tokens=4)["finish_reason"] in ("length", "stop")
