"""A service that is used and misused for minutes leaks no block, descriptor, process, thread, segment or memory."""

import asyncio
import contextlib
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.leftovers import SHARED_MEMORY, Leftovers
from tests.service_process import ServiceProcess, wait_until

NUM_CLIENTS = 12
SAMPLE_SECONDS = 0.5
SETTLE_SECONDS = 60.0
# Everything that is kept for a while is kept for less than a quarter; the blocks are so few that all are soon in use.
OPTIONS = ("-tp", "2", "--num-kv-blocks", "200", "--max-num-seqs", "8", "--stream-resume-timeout", "5")
Act = Callable[[httpx.AsyncClient, random.Random], Coroutine[Any, Any, str]]


def body(draw: random.Random, **more: Any) -> dict[str, Any]:
    prompt = [draw.randrange(256, 2000) for _ in range(draw.choice([1, 5, 40, 300]))]
    return {"prompt": prompt, "max_tokens": draw.randrange(1, 60), "n": draw.choice([1, 1, 3]), **more}


async def complete(client: httpx.AsyncClient, draw: random.Random) -> str:
    answer = await client.post("/v1/completions", json=body(draw))
    return f"complete {answer.status_code}"


async def stream(client: httpx.AsyncClient, draw: random.Random) -> str:
    async with client.stream("POST", "/v1/completions", json=body(draw, stream=True)) as response:
        last = ""
        async for line in response.aiter_lines():
            last = line or last
        return f"stream {response.status_code} {last}"


async def leave_a_stream(client: httpx.AsyncClient, draw: random.Random) -> str:
    async with client.stream("POST", "/v1/completions", json=body(draw, stream=True, max_tokens=500)) as response:
        async for _ in response.aiter_lines():
            if draw.random() < 0.1:
                break
    return "left"


async def leave_before_the_answer(client: httpx.AsyncClient, draw: random.Random) -> str:
    with contextlib.suppress(httpx.TimeoutException):
        await client.post("/v1/completions", json=body(draw, max_tokens=500), timeout=draw.uniform(0.01, 0.5))
    return "left"


async def ask_wrongly(client: httpx.AsyncClient, draw: random.Random) -> str:
    answer = await client.post("/v1/completions", json=body(draw, temperature=-draw.random()))
    return f"wrong {answer.status_code}"


async def look(client: httpx.AsyncClient, draw: random.Random) -> str:
    answer = await client.get(draw.choice(["/metrics", "/ready", "/v1/models", "/nowhere"]))
    return f"look {answer.status_code}"


ACTS: tuple[Act, ...] = (complete, stream, stream, leave_a_stream, leave_before_the_answer, ask_wrongly, look)
EXPECTED = {"complete 200", "stream 200 data: [DONE]", "left", "wrong 400", "look 200", "look 404"}


@dataclass
class Users:
    """Clients that do one thing after the other for a while, in a thread of their own."""

    url: str
    seconds: float
    seed: int
    outcomes: Counter[str] = field(default_factory=Counter)

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        thread.start()
        return thread

    async def _run(self) -> None:
        end = time.monotonic() + self.seconds
        await asyncio.gather(*(self._use(random.Random(f"{self.seed} {index}"), end) for index in range(NUM_CLIENTS)))

    async def _use(self, draw: random.Random, end: float) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as client:
            while time.monotonic() < end:
                self.outcomes[await draw.choice(ACTS)(client, draw)] += 1


@dataclass(frozen=True)
class Holdings:
    """What a service holds while it is idle."""

    processes: int
    descriptors: dict[int, int]  # by process
    threads: dict[int, int]
    segments: dict[int, int]  # of shared memory, which have no names, that each has mapped
    files: frozenset[str]


def holdings(service: ServiceProcess, folder: Path) -> Holdings:
    """Return what `service`, whose TMPDIR is `folder`, holds."""
    processes = [psutil.Process(service.process.pid), *service.descendants()]
    return Holdings(
        len(processes),
        {process.pid: process.num_fds() for process in processes},
        {process.pid: process.num_threads() for process in processes},
        {process.pid: _maps(process.pid).count(f"{SHARED_MEMORY}/") for process in processes},
        frozenset(str(path) for path in folder.rglob("*")),
    )


def _maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def resident(service: ServiceProcess) -> int:
    """Return the bytes of all processes together."""
    return sum(process.memory_info().rss for process in [psutil.Process(service.process.pid), *service.descendants()])


def soak(seconds: float, tell: Callable[[str], None]) -> None:
    seed = random.SystemRandom().randrange(2**32)
    tell(f"seed {seed}")
    with Leftovers() as leftovers, ServiceProcess(*OPTIONS, environment=leftovers.environment) as service:
        Users(service.url, 3, seed + 1).start().join()  # what is made once, is made
        service.wait_until_idle()
        wait_until(lambda: not _connections(service), SETTLE_SECONDS)
        before = holdings(service, leftovers.folder)
        assert sum(before.segments.values()) > 0
        users = Users(service.url, seconds, seed)
        thread, samples = users.start(), list[int]()
        while thread.is_alive():
            samples.append(resident(service))
            time.sleep(SAMPLE_SECONDS)
        service.wait_until_idle()
        wait_until(lambda: not _connections(service), SETTLE_SECONDS)
        wait_until(lambda: _has_no_more(holdings(service, leftovers.folder), before), SETTLE_SECONDS)
    assert set(users.outcomes) <= EXPECTED, users.outcomes
    quarter = len(samples) // 4
    second, last = (statistics.fmean(part) for part in (samples[quarter : 2 * quarter], samples[-quarter:]))
    growth = last - second
    tell(f"{sum(users.outcomes.values())} acts in {seconds:.0f} s: {dict(users.outcomes.most_common())}")
    tell(f"resident: second quarter {second / 2**20:.1f} MiB, last quarter {last / 2**20:.1f} MiB")
    assert growth < max(0.01 * second, 8e6)


def _connections(service: ServiceProcess) -> list[Any]:
    return [c for c in psutil.Process(service.process.pid).net_connections("tcp") if c.status == "ESTABLISHED"]


def _has_no_more(now: Holdings, before: Holdings) -> bool:
    return (
        now.processes == before.processes
        and now.files <= before.files
        and all(now.descriptors[pid] <= number for pid, number in before.descriptors.items())
        and all(now.threads[pid] <= number for pid, number in before.threads.items())
        and all(now.segments[pid] <= number for pid, number in before.segments.items())
    )


@pytest.mark.timeout(600)
def test_two_minutes_of_use_leak_nothing(tell: Callable[[str], None]) -> None:
    soak(120, tell)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_twenty_minutes_of_use_leak_nothing(tell: Callable[[str], None]) -> None:
    soak(1200, tell)
