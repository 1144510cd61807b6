"""What deploy/kubernetes starts, without a cluster: the Job's command, the Deployment's options, the probes' paths."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest

from engine.protocol.config import EMBEDDED_MODEL
from tests.manifests import ROOT, Manifest, build, container_of, one, options_of_pod
from tests.ports import free_port
from tests.service_process import ServiceProcess, suspended, wait_until

KEY = "a-key-of-a-secret"
LONG: dict[str, Any] = {"prompt": "def f(", "max_tokens": 1000, "ignore_eos": True, "stream": True}
HEADERS = {"Authorization": f"Bearer {KEY}"}


@dataclass
class Probes:
    """Asks what the kubelet asks, all the time, and keeps the answers: liveness, readiness and its state."""

    url: str
    container: Manifest
    answers: list[tuple[int, int, str]] = field(default_factory=list)
    num_seen: int = 0

    def __enter__(self) -> Self:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        alive, ready = (self.container[f"{name}Probe"]["httpGet"]["path"] for name in ("liveness", "readiness"))
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not self._end.wait(0.05):
                try:
                    first, second = client.get(alive), client.get(ready)
                except httpx.TransportError:  # it does not listen yet, or no more
                    continue
                self.answers.append((first.status_code, second.status_code, second.json()["state"]))

    def wait_for(self, state: str) -> None:
        """Wait for the first answer that tells of a state, after those that were waited for before."""

        def states() -> list[str]:
            return [each[2] for each in self.answers[self.num_seen :]]

        wait_until(lambda: state in states(), 120)
        self.num_seen += states().index(state) + 1


@pytest.fixture(scope="module")
def manifests() -> list[Manifest]:
    return build("overlays/cpu")


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the volume of models, with what the Job wrote into it."""
    folder = tmp_path_factory.mktemp("models")
    job = container_of(one(build("model"), "Job"))
    places = {"org/name": str(EMBEDDED_MODEL), "/models/model-on-2": f"{folder}/model-on-2"}
    words = [places.get(word, word) for word in job["args"]]
    assert places.keys() <= {*job["args"]}
    subprocess.run([sys.executable, "-P", "-m", "server", *words], cwd=ROOT, check=True, timeout=200)
    return folder


def variables(manifests: list[Manifest], volume: Path, port: int) -> Iterator[tuple[str, str]]:
    """Yield the Deployment's variables, with a host's paths in place of the pod's."""
    yield "RYZANSTEIN_PORT", str(port)
    for name, value in options_of_pod(manifests).items():
        if name == "RYZANSTEIN_API_KEY_FILE":
            path = volume / Path(value).name
            path.write_text(KEY)
            yield name, str(path)
        else:
            yield name, value.replace("/models/", f"{volume}/")


def test_a_pod_is_alive_from_its_first_answer_to_its_last_and_ready_only_when_it_takes_requests(
    manifests: list[Manifest], volume: Path
) -> None:
    container, port = container_of(one(manifests, "Deployment")), free_port()
    command = [sys.executable, "-P", "-m", "server", *container["args"]]
    service = ServiceProcess(command=command, environment=dict(variables(manifests, volume, port)))
    with Probes(f"http://127.0.0.1:{port}", container) as probes, ThreadPoolExecutor(1) as pool:
        starting = pool.submit(hold_up_the_start, service, probes)
        with service:
            starting.result()
            probes.wait_for("READY")
            assert_answers(service)
            with no_ranks_started(service):
                os.kill(service.rank_pids()[1], signal.SIGKILL)
                probes.wait_for("RECOVERING")
            probes.wait_for("READY")
            with httpx.stream("POST", f"{service.url}/v1/completions", json=LONG, headers=HEADERS) as stream:
                lines = stream.iter_lines()
                next(lines)
                with service.held():
                    service.process.terminate()
                    probes.wait_for("DRAINING")
                assert "data: [DONE]" in lines
            assert service.process.wait(60) == 0
    assert {alive for alive, _, _ in probes.answers} == {200}
    states = {(ready, state) for _, ready, state in probes.answers}
    assert states == {(503, "STARTING"), (200, "READY"), (503, "RECOVERING"), (503, "DRAINING")}


def hold_up_the_start(service: ServiceProcess, probes: Probes) -> None:
    """Stop the orchestrator of a service that is about to be started, until the probes have seen it start."""
    wait_until(lambda: hasattr(service, "process") and has_orchestrator(service), 60)
    with suspended(service.orchestrator()):
        probes.wait_for("STARTING")


def has_orchestrator(service: ServiceProcess) -> bool:
    """Whether it is itself, and no longer a copy of the server that is about to become it."""
    return any("engine.orchestrator" in process.cmdline() for process in service.descendants())


@contextmanager
def no_ranks_started(service: ServiceProcess) -> Iterator[None]:
    """Stop what ranks are forked from, inside the block."""
    ranks = service.rank_pids()
    (forks,) = [child for child in service.orchestrator().children() if child.pid not in ranks]
    with suspended(forks):
        yield


def assert_answers(service: ServiceProcess) -> None:
    """See that it answers those who have the key, and nobody else, and is scraped by all."""
    body = {"model": "model", "prompt": "import ", "max_tokens": 4}
    assert httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).status_code == 401
    answer = httpx.post(f"{service.url}/v1/completions", json=body, headers=HEADERS, timeout=60)
    assert answer.json()["choices"][0]["text"]
    path = one(build("overlays/cpu"), "ServiceMonitor")["spec"]["endpoints"][0]["path"]
    served = httpx.get(f"{service.url}{path}").text
    scaler = one(build("overlays/cpu"), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert all(f"\n{item['pods']['metric']['name']} " in served.replace("{", " ") for item in scaler)
