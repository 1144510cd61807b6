"""Several API keys on a whole service: their limits, their shares, their names."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.service_process import REQUEST_SECONDS, ROOT, ServiceProcess, wait_until

KEYS = """
- name: crowd
  key: sk-of-the-crowd
- name: single
  key: sk-of-one
- name: bounded
  key: sk-of-the-bounded
  requests_per_minute: 3
  max_concurrent_requests: 2
"""
PATH = "/v1/completions"
NUM_CROWD = 40
NUM_PLACES = 3  # in the engine: one more than run at once


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    path.write_text(KEYS)
    with ServiceProcess("--api-key-file", str(path), "--max-num-seqs", "2", "--num-kv-blocks", "256") as service:
        yield service


def body(num_tokens: int) -> dict[str, object]:
    return {"prompt": "import ", "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0}


def headers(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def ask(service: ServiceProcess, key: str, num_tokens: int = 2) -> httpx.Response:
    return httpx.post(service.url + PATH, json=body(num_tokens), headers=headers(key), timeout=REQUEST_SECONDS)


async def ends(service: ServiceProcess) -> list[str]:
    """Have one key send many requests and, when they wait, another a few; return whose ended, in this order."""
    order: list[str] = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=service.url, timeout=REQUEST_SECONDS, limits=limits) as client:

        async def one(name: str, key: str) -> None:
            (await client.post(PATH, json=body(24), headers=headers(key))).raise_for_status()
            order.append(name)

        with service.held():
            crowd = [asyncio.create_task(one("crowd", "sk-of-the-crowd")) for _ in range(NUM_CROWD)]
            await asyncio.to_thread(wait_for_queued, service, NUM_CROWD - NUM_PLACES)
            singles = [asyncio.create_task(one("single", "sk-of-one")) for _ in range(3)]
            await asyncio.to_thread(wait_for_queued, service, NUM_CROWD - NUM_PLACES + 3)
        await asyncio.gather(*crowd, *singles)
    return order


def wait_for_queued(service: ServiceProcess, number: int) -> None:
    wait_until(lambda: service.metric("ryzanstein_queued_requests") == number, 60)


def test_who_sends_little_does_not_wait_for_who_sends_much(service: ServiceProcess) -> None:
    order = asyncio.run(ends(service))
    assert len(order) == NUM_CROWD + 3
    after_the_last = order[::-1].index("single")
    assert after_the_last >= 10


def test_tokens_are_counted_by_the_keys_names(service: ServiceProcess) -> None:
    before = service.metric("ryzanstein_key_generation_tokens_total", 'key="single"')
    assert ask(service, "sk-of-one", 7).status_code == 200
    assert service.metric("ryzanstein_key_generation_tokens_total", 'key="single"') == before + 7
    assert "sk-" not in httpx.get(f"{service.url}/metrics").text
    assert "sk-" not in service.stderr


def test_a_key_beyond_its_limits_is_refused_and_others_are_served(service: ServiceProcess) -> None:
    statuses = [ask(service, "sk-of-the-bounded").status_code for _ in range(4)]
    assert statuses == [200, 200, 200, 429]
    assert ask(service, "sk-of-one").status_code == 200
    assert ask(service, "sk-of-nobody").status_code == 401
    assert service.metric("ryzanstein_requests_rejected_total", "rate_limit") == 1


def test_a_file_with_a_wrong_key_ends_the_start_with_one_line_that_does_not_show_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("- {name: a, key: sk-very-secret, requests_per_minute: many}\n")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "server", "serve", "--api-key-file", str(path), "--port", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"ryzanstein: error: --api-key-file {path}: key 1: requests_per_minute must be a whole number "
        "between 1 and 1000000\n"
    )
