"""Streams whose connections break: what their clients get in the end is what they would have got without."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import httpx
import pytest

from tests.service_process import ServiceProcess, wait_until

SEED = 20_250_607
NUM_STREAMS = 8
BODY: dict[str, Any] = {
    "max_tokens": 120,
    "ignore_eos": True,
    "stream": True,
    "frequency_penalty": 0.3,
    "stream_options": {"include_usage": True},
}
Event = tuple[int, str]


@pytest.fixture(scope="module")
def service() -> Iterator[ServiceProcess]:
    with ServiceProcess("-tp", "2", "--dtype", "float32", "--batch-invariant") as service:
        yield service


def bodies() -> list[dict[str, Any]]:
    """Return requests of which some are greedy, some sampled, some of several choices."""
    return [
        {**BODY, "prompt": f"# {index}\ndef ", "temperature": index % 2, "seed": index, "n": 1 + index % 3 // 2}
        for index in range(NUM_STREAMS)
    ]


def take(response: httpx.Response, number: int) -> list[Event]:
    """Return the next events, at most so many."""
    events: list[Event] = []
    event_id = 0
    for line in response.iter_lines():
        if line.startswith("id: "):
            event_id = int(line.removeprefix("id: "))
        elif line:
            events.append((event_id, line.removeprefix("data: ")))
            if len(events) == number:
                break
    return events


def read(service: ServiceProcess, body: dict[str, Any], cuts: list[int]) -> list[Event]:
    """Return a stream's events; the connection breaks after so many of them each time."""
    events: list[Event] = []
    for number in (*cuts, 10**9):
        method, path = ("GET", f"/v1/streams/{stream_id(events)}") if events else ("POST", "/v1/completions")
        headers = {"last-event-id": str(events[-1][0])} if events else {}
        content = None if events else json.dumps(body).encode()
        headers["content-type"] = "application/json"
        with httpx.stream(method, service.url + path, content=content, headers=headers, timeout=120) as response:
            assert response.status_code == 200
            events += take(response, number)
    return events


def stream_id(events: list[Event]) -> str:
    found: str = json.loads(events[0][1])["id"]
    return found


def contents(events: list[Event]) -> list[Any]:
    """Return what the events say, but for the stream's id and the time, with their numbers.

    The order of the choices' tokens among each other depends on when each was scheduled: they are put together.
    """
    assert [number for number, _ in events] == list(range(1, len(events) + 1))
    assert events[-1][1] == "[DONE]"
    chunks = [json.loads(data) for _, data in events[:-1]]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return [
        [choice for choice in choices if choice["index"] == 0],
        [choice for choice in choices if choice["index"] == 1],
        {**chunks[-1]["usage"], "prompt_tokens_details": None},
    ]


def test_streams_cut_at_random_and_gone_on_with_say_what_undisturbed_ones_say(
    service: ServiceProcess, tell: Callable[[str], None]
) -> None:
    random = Random(SEED)
    tell(f"streams cut at random: seed {SEED}")
    cuts = [[1 + random.randrange(40) for _ in range(3)] for _ in range(NUM_STREAMS)]
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        disturbed = list(pool.map(read, [service] * NUM_STREAMS, bodies(), cuts))
        undisturbed = list(pool.map(read, [service] * NUM_STREAMS, bodies(), [[]] * NUM_STREAMS))
    for one, other in zip(disturbed, undisturbed, strict=True):
        assert contents(one) == contents(other)


def test_a_stream_that_nobody_reads_gives_its_blocks_back(service: ServiceProcess) -> None:
    body = {**BODY, "prompt": "x", "max_tokens": 900, "n": 4}
    before = service.metric("ryzanstein_generation_tokens_total")
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=120) as response:
        assert len(take(response, 8)) == 8
    wait_until(lambda: service.metric("ryzanstein_kv_cache_used_blocks") == 0, 30)
    assert service.metric("ryzanstein_generation_tokens_total") - before < 4 * 900  # else it ended by itself
    assert service.metric("ryzanstein_num_requests_running") == 0


def test_a_stream_left_before_its_ranks_died_goes_on_after_them(service: ServiceProcess) -> None:
    body = {**BODY, "prompt": "import ", "temperature": 0}
    undisturbed = read(service, body, [])
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=120) as response:
        events = take(response, 30)
    os.kill(service.rank_pids()[1], signal.SIGKILL)
    headers = {"last-event-id": "30"}
    with httpx.stream("GET", f"{service.url}/v1/streams/{stream_id(events)}", headers=headers, timeout=120) as response:
        events += take(response, 10**9)
    assert contents(events) == contents(undisturbed)
    wait_until(lambda: httpx.get(f"{service.url}/ready").json()["epoch"] == 2, 60)
