"""Ten times as many requests as can be served: each is served whole or refused at once, and nothing grows."""

import asyncio
import json
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx
import psutil
import pytest

from tests.service_process import REQUEST_SECONDS, ServiceProcess

NUM_PLACES, NUM_QUEUED = 4, 8
OVERLOAD = 10  # times what can be served
NUM_TOKENS = 256
NUM_ALONE = 12  # requests that are measured before, as many at once as there are places
MEMORY_SHARE, MEMORY_BYTES = 0.02, 8e6  # either may be gained
PATH = "/v1/completions"
HEADER = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n"
HEADER += b"content-type: application/json\r\n\r\n"


@dataclass(frozen=True)
class Outcome:
    status: int
    first_token: float = 0.0  # seconds from the request to it
    whole: float = 0.0  # … and to the end
    num_tokens: int = 0
    is_whole: bool = False


@dataclass
class Load:
    """What became of the requests of one run, and how the service did meanwhile."""

    outcomes: list[Outcome]
    most_queued: float = 0.0
    memory: list[float] = field(default_factory=list)  # bytes, of all processes

    @property
    def accepted(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == 200]

    def memory_growth(self) -> float:
        """Return how much more memory the last third of the time needed than the first, in bytes."""
        third = len(self.memory) // 3
        return statistics.mean(self.memory[-third:]) - statistics.mean(self.memory[:third])


@pytest.fixture(scope="module")
def service() -> Iterator[ServiceProcess]:
    bounds = "--max-num-seqs", str(NUM_PLACES), "--max-queued-requests", str(NUM_QUEUED)
    with ServiceProcess(*bounds, "--num-kv-blocks", "256", "--log-level", "warning") as service:
        yield service


async def ask(address: tuple[str, int], number: int) -> Outcome:
    """Ask for a text of which every token comes as an event; at little cost, since the service has the same cores."""
    body = {"prompt": f"# {number}\n", "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True, "temperature": 0}
    content = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    reader, writer = await asyncio.open_connection(*address)
    writer.write(HEADER % len(content) + content)
    begin, first, answer = time.perf_counter(), 0.0, b""
    while piece := await reader.read(65536):
        answer += piece
        if not first and b"\ndata: " in answer:
            first = time.perf_counter() - begin
    whole = time.perf_counter() - begin
    writer.close()
    return outcome_of(answer.decode(), first, whole)


def outcome_of(answer: str, first: float, whole: float) -> Outcome:
    status, events = int(answer.split(" ", 2)[1]), re.findall(r"^data: (.*?)\r?$", answer, re.MULTILINE)
    if status == 429:
        assert '"code":"queue_full"' in answer
        assert re.search(r"^retry-after: [1-9]\d*\r$", answer, re.MULTILINE)
    if status != 200:
        return Outcome(status)
    *_, usage, done = events
    return Outcome(200, first, whole, json.loads(usage)["usage"]["completion_tokens"], done == "[DONE]")


async def service_time(address: tuple[str, int]) -> float:
    """Return the median time of a request while all places are taken and nobody waits, in seconds."""
    places = asyncio.Semaphore(NUM_PLACES)

    async def one(number: int) -> Outcome:
        async with places:
            return await ask(address, number)

    return statistics.median([outcome.whole for outcome in await asyncio.gather(*map(one, range(NUM_ALONE)))])


async def watch(service: ServiceProcess, load: Load) -> None:
    processes = [psutil.Process(service.process.pid), *service.descendants()]
    while True:
        queued = await asyncio.to_thread(service.metric, "ryzanstein_queued_requests")
        load.most_queued = max(load.most_queued, queued)
        load.memory.append(sum(process.memory_info().rss for process in processes))
        await asyncio.sleep(0.5)


async def overload(service: ServiceProcess, seconds: float, seed: int) -> tuple[float, Load]:
    """Send requests at random moments for so long; return the service time before that, and what became of them."""
    rng, load = random.Random(seed), Load([])
    host, port = service.url.removeprefix("http://").split(":")
    address = host, int(port)
    alone = await service_time(address)
    watching = asyncio.create_task(watch(service, load))
    requests: list[asyncio.Task[Outcome]] = []
    at = time.perf_counter()
    end = at + seconds
    while at < end:
        at += rng.expovariate(OVERLOAD * NUM_PLACES / alone)
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        requests.append(asyncio.create_task(ask(address, len(requests))))
    load.outcomes = await asyncio.gather(*requests)
    watching.cancel()
    return alone, load


def check(service: ServiceProcess, load: Load) -> None:
    """Fail unless each request was served whole or refused, no more waited than may, and nothing is left."""
    assert Counter(outcome.status for outcome in load.outcomes).keys() == {200, 429}
    assert all(outcome.is_whole and outcome.num_tokens == NUM_TOKENS for outcome in load.accepted)
    assert load.most_queued <= NUM_QUEUED
    service.wait_until_idle()
    for name in ("queued_requests", "queued_tokens", "num_requests_running", "num_requests_waiting"):
        assert service.metric(f"ryzanstein_{name}") == 0
    num_ended = service.metric("ryzanstein_request_success_total", '"length"')
    assert (
        num_ended
        == service.metric("ryzanstein_key_requests_total")
        == service.metric("ryzanstein_request_success_total")
    )


def report(alone: float, load: Load) -> str:
    counts = Counter(outcome.status for outcome in load.outcomes)
    first = sorted(outcome.first_token for outcome in load.accepted)
    bound = 1.5 * (NUM_QUEUED / NUM_PLACES + 1) * alone
    growth, least = load.memory_growth(), min(load.memory)
    return (
        f"overload: {counts[200]} served, {counts[429]} refused; first token p50 {statistics.median(first):.2f} s, "
        f"p99 {first[int(len(first) * 0.99)]:.2f} s (bound {bound:.2f} s: service time {alone:.2f} s at {NUM_PLACES}); "
        f"most queued {load.most_queued:.0f}; memory {growth / 1e6:+.1f} MB of {least / 1e6:.0f} MB"
    )


def test_overload_is_answered_with_200_or_429_and_every_200_is_whole(
    service: ServiceProcess, tell: Callable[[str], None]
) -> None:
    alone, load = asyncio.run(overload(service, seconds=10, seed=1))
    tell(report(alone, load))
    check(service, load)


def test_deadlines_end_what_runs_and_what_waits_and_free_its_blocks(service: ServiceProcess) -> None:
    checks = service.metric("ryzanstein_integrity_checks_total")
    body = {"prompt": "import ", "max_tokens": 900, "ignore_eos": True, "timeout": 0.5}

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=service.url, timeout=REQUEST_SECONDS) as client:
            return await asyncio.gather(*(client.post(PATH, json=body) for _ in range(NUM_PLACES + NUM_QUEUED)))

    answers = asyncio.run(ask_all())
    assert {answer.json()["error"]["code"] for answer in answers} == {"timeout"}
    assert {answer.status_code for answer in answers} == {504}
    service.wait_until_idle(checks)
    assert service.metric("ryzanstein_queued_requests") == 0


@pytest.mark.slow
def test_a_minute_of_overload_keeps_first_tokens_and_memory_within_bounds(
    service: ServiceProcess, tell: Callable[[str], None]
) -> None:
    alone, load = asyncio.run(overload(service, seconds=60, seed=2))
    tell(report(alone, load))
    check(service, load)
    assert load.memory_growth() < max(MEMORY_SHARE * min(load.memory), MEMORY_BYTES)
