"""Ranks are killed, stopped and wedged under load, again and again: clients see a pause, and nothing else."""

import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.protocol.config import EMBEDDED_MODEL
from tests.fault.crowd import Crowd, Stream
from tests.oracle import Comparison, Reference
from tests.service_process import ServiceProcess, wait_until

RECOVERY_SECONDS = 120.0  # generous: only a hang should exceed it
RANK_TIMEOUT = 2
FAULTY = (sys.executable, "-m", "tests.fault.serve", "serve", "--port", "0")
EXACT = ("--dtype", "float32", "--batch-invariant")
Disturbance = Callable[[dict[str, Any], random.Random], int]  # does something to a rank of /ready's, and says to which


def faulty_service(*arguments: str, **faults: str) -> ServiceProcess:
    """Return a service whose ranks fail as `tests.fault.worker` says."""
    environment = {f"FAULTS_{name.upper()}": value for name, value in faults.items()}
    return ServiceProcess(command=[*FAULTY, *arguments], environment=environment)


def bodies(number: int, max_tokens: int) -> list[dict[str, Any]]:
    """Return requests, half of them sampled, that take all their tokens."""
    draw = random.Random(7)
    return [
        {
            "prompt": [draw.randrange(256, 2000) for _ in range(draw.randrange(3, 40))],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "seed": index,
            "temperature": index % 2,
            "presence_penalty": (index % 3) / 2,
        }
        for index in range(number)
    ]


def undisturbed(service: ServiceProcess, requests: Sequence[dict[str, Any]]) -> list[Stream]:
    with Crowd(service.url, requests) as crowd:
        streams = crowd.finish()
    assert not any(stream.has_failed for stream in streams), [stream.errors for stream in streams]
    return streams


# --- what is done to ranks -------------------------------------------------------------------------------------------


def kill(ready: dict[str, Any], draw: random.Random) -> int:
    rank = draw.choice(ready["ranks"])
    os.kill(rank["pid"], signal.SIGKILL)
    return int(rank["rank"])


def stop(ready: dict[str, Any], draw: random.Random) -> int:
    rank = draw.choice(ready["ranks"])
    os.kill(rank["pid"], signal.SIGSTOP)
    return int(rank["rank"])


def wedge_in(folder: Path) -> Disturbance:
    def wedge(ready: dict[str, Any], draw: random.Random) -> int:
        rank = int(draw.choice(ready["ranks"])["rank"])
        (folder / f"wedge-{rank}").touch()
        return rank

    return wedge


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclass
class Recoveries:
    """Seconds of each phase of each recovery."""

    phases: dict[str, list[float]] = field(default_factory=dict)

    def note(self, began: float, recovery: dict[str, Any], streams: Sequence[Stream]) -> None:
        """Take over what one took, when every stream has gone on."""
        phases = {"detection": recovery["noticed_at"] - began, **recovery["seconds"]}
        is_back = recovery["noticed_at"] + sum(recovery["seconds"].values())
        firsts = [first for stream in streams if (first := stream.first_after(is_back)) is not None]
        if firsts:
            phases |= {"re-prefill": min(firsts) - is_back}
            phases |= {"first stream": min(firsts) - began, "last stream": max(firsts) - began}
        for phase, seconds in phases.items():
            self.phases.setdefault(phase, []).append(seconds)

    def together(self, *names: str) -> list[float]:
        """Return the sums of some phases, recovery by recovery."""
        return [sum(seconds) for seconds in zip(*(self.phases[name] for name in names), strict=True)]

    def lines(self) -> list[str]:
        """Return them as people read them."""
        return [
            f"{phase}: p50 {statistics.median(seconds):.3f} s, max {max(seconds):.3f} s ({len(seconds)})"
            for phase, seconds in self.phases.items()
        ]


def import_torch_seconds() -> float:
    """Return how long Python takes to import torch, the median of some tries."""
    tries = []
    for _ in range(3):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        tries.append(time.monotonic() - began)
    return statistics.median(tries)


def ready_of(service: ServiceProcess) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(f"{service.url}/ready").json()
    return answer


def disturb(
    service: ServiceProcess,
    requests: Sequence[dict[str, Any]],
    disturbance: Disturbance,
    times: int,
    draw: random.Random,
) -> tuple[list[Stream], Recoveries]:
    """Stream `requests`, and do something to a rank so many times, each after all streams together went on a little."""
    recoveries = Recoveries()
    whole = sum(request["max_tokens"] for request in requests)
    share = whole // (times + 1)
    with Crowd(service.url, requests) as crowd:
        for number in range(times):
            moment = number * share + draw.randrange(share // 2, share)
            assert crowd.wait_for_tokens(max(moment, crowd.num_tokens + 1)), "the streams ended before it was done"
            before = ready_of(service)
            assert before["state"] == "READY", before
            began = time.time()
            disturbance(before, draw)
            after = recovered(service, before["epoch"])
            crowd.wait_for_tokens(crowd.num_tokens + len(requests))
            recoveries.note(began, after["last_recovery"], crowd.streams)
        return crowd.finish(), recoveries


def recovered(service: ServiceProcess, epoch: int) -> dict[str, Any]:
    """Wait for a later epoch to be READY, and return what /ready says then."""

    def is_recovered() -> bool:
        ready = ready_of(service)
        assert ready["state"] != "FAILED", ready
        return bool(ready["state"] == "READY" and ready["epoch"] > epoch)

    wait_until(is_recovered, RECOVERY_SECONDS)
    return ready_of(service)


def check(streams: Sequence[Stream], expected: Sequence[Stream]) -> None:
    """Check that every client got exactly what it would have got."""
    failed = [stream.errors for stream in streams if stream.has_failed]
    assert not failed, f"{len(failed)} of {len(streams)} failed: {failed[:3]}"
    differing = [index for index, pair in enumerate(zip(streams, expected, strict=True)) if _differ(*pair)]
    assert not differing, f"streams {differing} differ"


def _differ(stream: Stream, expected: Stream) -> bool:
    return stream.answer != expected.answer


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", ["kill", pytest.param("stop", marks=pytest.mark.slow), pytest.param("wedge", marks=pytest.mark.slow)]
)
def test_disturbed_ranks_are_a_pause(how: str, tmp_path: Path, tell: Callable[[str], None]) -> None:
    seed = random.SystemRandom().randrange(2**32)
    tell(f"seed {seed}")
    disturbance = {"kill": kill, "stop": stop, "wedge": wedge_in(tmp_path)}[how]
    requests = bodies(16, 480)
    patience = () if how == "kill" else ("--rank-timeout", str(RANK_TIMEOUT))  # a busy rank may be silent for as long
    options = ("-tp", "2", *EXACT, *patience)
    with faulty_service(*options, folder=str(tmp_path)) as service:
        expected = undisturbed(service, requests)
        streams, recoveries = disturb(service, requests, disturbance, 3, random.Random(seed))
        check(streams, expected)
        assert service.metric("ryzanstein_recoveries_total") == 3
    for line in recoveries.lines():
        tell(f"{how}: {line}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("how", ["kill", "stop", "wedge"])
def test_twenty_disturbances_under_64_streams_change_nothing(
    how: str, tp_size: int, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    tell(f"seed {seed}")
    disturbance = {"kill": kill, "stop": stop, "wedge": wedge_in(tmp_path)}[how]
    requests = bodies(64, 300)
    options = ("-tp", str(tp_size), *EXACT, "--rank-timeout", str(RANK_TIMEOUT))
    with faulty_service(*options, folder=str(tmp_path)) as service:
        expected = undisturbed(service, requests)
        streams, recoveries = disturb(service, requests, disturbance, 20, random.Random(seed))
        check(streams, expected)
    for line in recoveries.lines():
        tell(f"{how}, tp {tp_size}: {line}")
    torch_seconds = import_torch_seconds()
    names = ("detection", "kill", "respawn", "load") if how == "kill" else ("kill", "respawn", "load")
    sums = recoveries.together(*names)
    tell(
        f"{how}, tp {tp_size}: {' + '.join(names)}: p50 {statistics.median(sums) / torch_seconds:.2f}, "
        f"max {max(sums) / torch_seconds:.2f} times the import of torch ({torch_seconds:.2f} s)"
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_without_batch_invariance_texts_part_at_near_ties_alone(how: str, tell: Callable[[str], None]) -> None:
    seed = random.SystemRandom().randrange(2**32)
    tell(f"seed {seed}")
    requests = [{**body, "temperature": 0, "presence_penalty": 0} for body in bodies(64, 300)]
    options = ("-tp", "2", "--dtype", "float32", "--rank-timeout", str(RANK_TIMEOUT))
    with faulty_service(*options) as service:
        streams, _ = disturb(service, requests, {"kill": kill, "stop": stop}[how], 20, random.Random(seed))
    failed = [stream.errors for stream in streams if stream.has_failed]
    assert not failed, f"{len(failed)} failed: {failed[:3]}"
    reference, comparison = Reference(EMBEDDED_MODEL), Comparison()
    for stream in streams:
        reference.check_greedy(stream.body["prompt"], stream.token_ids, comparison)
    assert comparison.tokens == 64 * 300
    tell(f"{how}: {comparison.tokens} tokens, {comparison.near_ties} near-ties went the other way")


DEADLY_TOKEN = 255


def test_a_request_that_kills_its_rank_each_time_ends_alone(tell: Callable[[str], None]) -> None:
    requests = bodies(8, 60)
    with faulty_service("-tp", "2", *EXACT, deadly_token=str(DEADLY_TOKEN)) as service:
        expected = undisturbed(service, requests)
        with Crowd(service.url, requests) as crowd:
            crowd.wait_for_tokens(40)
            deadly = httpx.post(
                f"{service.url}/v1/completions",
                json={"prompt": [DEADLY_TOKEN, 300, 301], "max_tokens": 5},
                timeout=RECOVERY_SECONDS,
            )
            streams = crowd.finish()
        assert deadly.status_code == 500
        assert deadly.json()["error"]["code"] == "engine_error"
        tell(f"the deadly request's error: {deadly.json()['error']['message']}")
        check(streams, expected)
        assert service.complete(prompt="x", max_tokens=2)
