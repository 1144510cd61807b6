"""A real service whose processes are killed under load: for its clients that is a pause, and nothing else."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import psutil
import pytest

from tests.fault.crowd import Crowd
from tests.leftovers import Leftovers
from tests.metric_samples import sample_lines
from tests.service_process import REQUEST_SECONDS, ServiceProcess, wait_until

OPTIONS = ("-tp", "2", "--dtype", "float32", "--batch-invariant", "--stream-resume-timeout", "0")
STREAMS = [
    {"prompt": f"def f{index}(", "max_tokens": 400, "ignore_eos": True, "seed": index, "temperature": 0.9}
    for index in range(8)
]
LONG_PROMPT = "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n\n\n"
COUNTED = {"max_tokens": 220, "min_tokens": 180, "temperature": 0.8}
BODIES: dict[str, dict[str, Any]] = {
    "choices with logprobs": {**COUNTED, "prompt": LONG_PROMPT, "n": 3, "seed": 1, "logprobs": 2},
    "the prompt's scores": {**COUNTED, "prompt": LONG_PROMPT, "seed": 2, "prompt_logprobs": 1},
    "echo": {**COUNTED, "prompt": LONG_PROMPT, "seed": 3, "echo": True, "logprobs": 1},
    "penalties": {
        **COUNTED, "prompt": LONG_PROMPT, "seed": 4, "repetition_penalty": 1.3, "presence_penalty": 0.4,
        "frequency_penalty": 0.6, "logit_bias": {"40": 3.0},
    },
    "stop strings": {**COUNTED, "prompt": LONG_PROMPT, "seed": 5, "stop": ["return", "("]},
    "greedy": {**COUNTED, "prompt": LONG_PROMPT, "temperature": 0, "return_token_ids": True},
    "the best of several": {**COUNTED, "prompt": LONG_PROMPT, "seed": 6, "best_of": 3, "n": 2, "min_p": 0.02},
}  # fmt: skip


@pytest.fixture(scope="module")
def leftovers() -> Iterator[Leftovers]:
    with Leftovers() as leftovers:
        yield leftovers


@pytest.fixture(scope="module")
def service(leftovers: Leftovers) -> Iterator[ServiceProcess]:
    with ServiceProcess(*OPTIONS, environment=leftovers.environment) as service:
        yield service
        processes = service.descendants()
        service.process.terminate()
        assert service.process.wait(20) == 0
        leftovers.check(processes)


@pytest.fixture(scope="module")
def undisturbed(service: ServiceProcess) -> list[Any]:
    with Crowd(service.url, STREAMS) as crowd:
        return [stream.answer for stream in crowd.finish()]


def readiness(service: ServiceProcess) -> httpx.Response:
    return httpx.get(f"{service.url}/ready")


def epoch(service: ServiceProcess) -> int:
    number: int = readiness(service).json()["epoch"]
    return number


def rank(service: ServiceProcess, number: int) -> psutil.Process:
    return psutil.Process(service.rank_pids()[number])


VICTIMS: dict[str, Callable[[ServiceProcess], psutil.Process]] = {
    "rank 0": partial(rank, number=0),
    "rank 1": partial(rank, number=1),
    "the orchestrator": ServiceProcess.orchestrator,
}


def wait_for_epoch(service: ServiceProcess, number: int) -> dict[str, Any]:
    """Wait until ranks of this epoch are ready, and return what /ready says."""
    wait_until(lambda: readiness(service).status_code == 200 and epoch(service) == number, 60)
    answer: dict[str, Any] = readiness(service).json()
    return answer


def num_resumed(service: ServiceProcess) -> float:
    """Return how often a group took over something."""
    return service.metric("ryzanstein_recovery_seconds_count", 'phase="first_token"')


@pytest.mark.parametrize("victim", VICTIMS)
def test_streams_go_on_as_if_nothing_had_been(victim: str, service: ServiceProcess, undisturbed: list[Any]) -> None:
    before, resumed, process = epoch(service), num_resumed(service), VICTIMS[victim](service)
    with Crowd(service.url, STREAMS) as crowd:
        assert crowd.wait_for_tokens(8 * 10)
        process.kill()
        streams = crowd.finish()
    assert [stream.errors for stream in streams] == [[]] * len(streams)
    assert not any(stream.has_failed for stream in streams)
    assert [stream.answer for stream in streams] == undisturbed
    recovery = wait_for_epoch(service, before + 1)["last_recovery"]
    assert victim.removeprefix("the ") in recovery["cause"]
    assert {"kill", "respawn", "load"} <= set(recovery["seconds"])
    assert num_resumed(service) == resumed + 1


def test_a_request_that_comes_while_there_is_no_engine_waits_for_the_next(service: ServiceProcess) -> None:
    body = {"prompt": LONG_PROMPT, "max_tokens": 5, "temperature": 0}
    expected = service.complete(**body)
    service.orchestrator().kill()
    wait_until(lambda: readiness(service).json()["state"] == "RECOVERING", 30)
    not_ready = readiness(service)
    assert not_ready.status_code == 503
    assert "orchestrator" in not_ready.json()["last_recovery"]["cause"]
    assert service.complete(**body) == expected
    assert readiness(service).status_code == 200


def ask_all(service: ServiceProcess) -> list[dict[str, Any]]:
    """Return the answers to all `BODIES`, asked at once, without what differs each time."""

    def ask(body: dict[str, Any]) -> dict[str, Any]:
        answer = httpx.post(f"{service.url}/v1/completions", json=body, timeout=REQUEST_SECONDS)
        assert answer.status_code == 200, answer.text
        return {name: value for name, value in answer.json().items() if name not in ("id", "created")}

    with ThreadPoolExecutor(len(BODIES)) as pool:
        return list(pool.map(ask, BODIES.values()))


def counters(service: ServiceProcess) -> dict[str, float]:
    """Return every sample that may only grow."""
    lines = sample_lines(httpx.get(f"{service.url}/metrics").text)
    samples = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
    return {
        name: value
        for name, value in samples.items()
        if name.split("{")[0].endswith(("_total", "_bucket", "_count", "_sum"))
    }


def test_whatever_a_request_asks_for_is_answered_as_without_the_kill(service: ServiceProcess) -> None:
    num_sequences = sum(max(body.get("n", 1), body.get("best_of", 1)) for body in BODIES.values())
    ask_all(service)  # so that the prompt is in the cache both times
    expected = ask_all(service)
    before, victim = counters(service), rank(service, 1)
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.extend(ask_all(service)))
    asking.start()
    begun = before["ryzanstein_request_queue_time_seconds_count"] + num_sequences
    wait_until(lambda: service.metric("ryzanstein_request_queue_time_seconds_count") == begun, 60)
    victim.kill()
    asking.join(REQUEST_SECONDS)
    for name, answer, undisturbed in zip(BODIES, answers, expected, strict=True):
        assert json.dumps(answer, indent=1) == json.dumps(undisturbed, indent=1), name
    after = counters(service)
    assert [name for name, value in before.items() if after[name] < value] == []
    grown = {name: after[name] - value for name, value in before.items()}
    assert grown['ryzanstein_recoveries_total{cause="died"}'] == 1
    assert grown['ryzanstein_recovery_seconds_count{phase="first_token"}'] == 1  # somebody was in flight
    assert grown["ryzanstein_request_queue_time_seconds_count"] == num_sequences
    assert grown["ryzanstein_time_to_first_token_seconds_count"] == num_sequences


def test_a_client_that_goes_away_while_there_is_no_engine_leaves_no_block(service: ServiceProcess) -> None:
    body = {**STREAMS[0], "max_tokens": 900, "stream": True}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body) as response:
        next(response.iter_lines())
        service.orchestrator().kill()
        wait_until(lambda: readiness(service).json()["state"] == "RECOVERING", 30)
    wait_until(lambda: service.metric("ryzanstein_request_success_total", 'finished_reason="abort"') > 0, 30)
    wait_until(lambda: readiness(service).status_code == 200, 60)
    assert service.complete(prompt="x", max_tokens=1)
    service.wait_until_idle()


def test_an_idle_service_recovers_too(service: ServiceProcess) -> None:
    before = epoch(service)
    rank(service, 0).kill()
    wait_for_epoch(service, before + 1)
    assert service.complete(prompt="x", max_tokens=1)
