"""SIGTERM and Ctrl-C: what was accepted is finished, what comes now is sent elsewhere, and who insists gets his way."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from tests.leftovers import Leftovers
from tests.service_process import ServiceProcess, suspended, wait_until

NUM_STREAMS = 64
BODY: dict[str, Any] = {"prompt": "def f(", "max_tokens": 400, "ignore_eos": True, "temperature": 0}
ENDLESS = {**BODY, "max_tokens": 1000}
PATIENT = ("-tp", "2", "--drain-timeout", "300")
AT_ONCE = 5.0  # seconds


@pytest.fixture
def leftovers() -> Iterator[Leftovers]:
    with Leftovers() as leftovers:
        yield leftovers


class Streams:
    """Clients that each read a stream to its end."""

    def __init__(self, service: ServiceProcess, body: dict[str, Any], number: int) -> None:
        self._url = service.url
        self._body = {**body, "stream": True}
        self.events: list[list[str]] = [[] for _ in range(number)]
        pool = ThreadPoolExecutor(number)
        self._futures: list[Future[None]] = [pool.submit(self._read, index) for index in range(number)]
        wait_until(lambda: all(self.events), 60)

    def _read(self, index: int) -> None:
        with httpx.stream("POST", f"{self._url}/v1/completions", json=self._body, timeout=120) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.events[index].append(line.removeprefix("data: "))

    def ends(self) -> list[str]:
        """Wait until all have ended, and return each one's last event."""
        for future in self._futures:
            future.result(60)
        return [events[-1] for events in self.events]


def errors_of(ends: list[str]) -> set[str]:
    return {json.loads(end)["error"]["message"] for end in ends}


def wait_until_draining(service: ServiceProcess) -> None:
    wait_until(lambda: httpx.get(f"{service.url}/ready").json()["state"] == "DRAINING", 60)


def test_all_streams_finish_whole_while_new_requests_are_sent_elsewhere(leftovers: Leftovers) -> None:
    with ServiceProcess(*PATIENT, environment=leftovers.environment) as service:
        processes = service.descendants()
        idle = socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=60)
        streams = Streams(service, {**BODY, "max_tokens": 250}, NUM_STREAMS)
        with service.held(), idle:
            service.process.terminate()
            assert idle.recv(1) == b""  # nobody asks there what would be refused
            wait_until_draining(service)
            assert httpx.get(f"{service.url}/ready").status_code == 503
            assert service.metric("ryzanstein_draining") == 1
            refused = httpx.post(f"{service.url}/v1/completions", json=BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["code"] == "shutting_down"
        assert streams.ends() == ["[DONE]"] * NUM_STREAMS
        assert service.process.wait(20) == 0
        leftovers.check(processes)
    for events in streams.events:
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    assert "Traceback" not in service.stderr


def test_a_rank_that_dies_while_streams_finish_is_a_pause(leftovers: Leftovers) -> None:
    with ServiceProcess(*PATIENT, environment=leftovers.environment) as service:
        processes = service.descendants()
        streams = Streams(service, BODY, 8)
        with service.held(rank=1):
            service.process.terminate()
            wait_until_draining(service)
            os.kill(service.rank_pids()[1], signal.SIGKILL)
        assert streams.ends() == ["[DONE]"] * 8
        assert service.process.wait(20) == 0
        leftovers.check(processes)
    for events in streams.events:
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_everything_at_once(second: signal.Signals, leftovers: Leftovers) -> None:
    with ServiceProcess("-tp", "2", environment=leftovers.environment) as service:
        processes = service.descendants()
        streams = Streams(service, {**ENDLESS, "n": 8}, 4)
        service.process.terminate()
        wait_until_draining(service)
        begin = time.monotonic()
        service.process.send_signal(second)
        assert service.process.wait(20) == 0
        assert time.monotonic() - begin < AT_ONCE
        assert errors_of(streams.ends()) == {"The server is shutting down."}
        leftovers.check(processes)
    assert "Traceback" not in service.stderr


def test_what_takes_longer_than_the_drain_timeout_ends_with_an_error(leftovers: Leftovers) -> None:
    with ServiceProcess("--drain-timeout", "0.5", environment=leftovers.environment) as service:
        processes = service.descendants()
        streams = Streams(service, {**ENDLESS, "n": 8}, 4)
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(20) == 0
        assert errors_of(streams.ends()) == {"The server is shutting down."}
        leftovers.check(processes)


def test_an_idle_service_and_one_whose_client_has_left_its_stream_end_at_once(leftovers: Leftovers) -> None:
    with ServiceProcess(environment=leftovers.environment) as service, httpx.Client() as client:
        processes = service.descendants()
        client.get(f"{service.url}/health")  # and stays connected
        with httpx.stream("POST", f"{service.url}/v1/completions", json={**ENDLESS, "stream": True}) as response:
            next(response.iter_raw())
        wait_until(lambda: service.metric("ryzanstein_streams_kept") == 1, 60)
        begin = time.monotonic()
        service.process.terminate()
        assert service.process.wait(20) == 0
        assert time.monotonic() - begin < AT_ONCE
        leftovers.check(processes)
    assert "Traceback" not in service.stderr


def test_a_client_that_reads_nothing_holds_up_the_end_no_longer_than_the_drain_timeout(leftovers: Leftovers) -> None:
    body = json.dumps({**ENDLESS, "n": 64, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    with ServiceProcess("--drain-timeout", "1", environment=leftovers.environment) as service:
        processes = service.descendants()
        with socket.socket() as connection:
            connection.connect(("127.0.0.1", int(service.url.rsplit(":", 1)[1])))
            connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
            assert connection.recv(64)
            begin = time.monotonic()
            service.process.terminate()
            assert service.process.wait(20) == 0
            assert time.monotonic() - begin < 1 + AT_ONCE
        leftovers.check(processes)


def test_a_service_that_is_loading_ends_at_once(leftovers: Leftovers) -> None:
    command = [sys.executable, "-P", "-m", "server", "serve", "-tp", "2", "--port", "0"]
    environment = {**os.environ, **leftovers.environment}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        wait_until(lambda: len(psutil.Process(process.pid).children(recursive=True)) >= 2, 60)
        processes = psutil.Process(process.pid).children(recursive=True)
        with suspended(processes[1]):  # what ranks are forked from: it is loading until it is ended
            begin = time.monotonic()
            process.terminate()
            _, errors = process.communicate(timeout=20)
        assert time.monotonic() - begin < AT_ONCE
    assert (process.returncode, errors) == (0, "")
    leftovers.check(processes)
