"""Clients that take their time: the engine does not wait for them, and what waits for them is bounded."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import httpx
import pytest

from server import streaming
from tests.metric_samples import sample_lines
from tests.unit.server_support import COMPLETIONS, RunningServer, running_server, wait_until

PATIENCE = 3.0  # seconds of a server that gives up early
NUM_CHOICES = 32  # of so many tokens: more than the system takes
TEXT = "the quick brown fox " * 20
MANY = {"prompt": "x", "n": NUM_CHOICES, "max_tokens": 240, "ignore_eos": True, "stream": True}


class SlowClient:
    """`with SlowClient(server) as client:` has asked for a stream and takes what it is told to."""

    def __init__(self, server: RunningServer) -> None:
        body = json.dumps(MANY).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self._request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        host, port = server.url.removeprefix("http://").split(":")
        self._address = host, int(port)
        self.received = b""

    def __enter__(self) -> Self:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.settimeout(30)
        self._socket.connect(self._address)
        self._socket.sendall(self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def take(self, num_bytes: int) -> int:
        """Take so many bytes, or less at the end; return how many."""
        piece = self._socket.recv(num_bytes)
        self.received += piece
        return len(piece)

    def take_all(self) -> None:
        while self.take(1 << 16):
            pass

    @property
    def event_ids(self) -> list[int]:
        lines = self.received.decode(errors="replace").split("\n")
        return [int(line.removeprefix("id: ")) for line in lines if line.startswith("id: ")]

    @property
    def stream_id(self) -> str:
        return self.received.partition(b'"id":"')[2].partition(b'"')[0].decode()


@pytest.fixture
def hasty(model: Path) -> Iterator[RunningServer]:
    with running_server(model, slow_client_timeout=PATIENCE) as server:
        server.engine.script = lambda _: TEXT
        yield server


def metric(server: RunningServer, name: str) -> float:
    lines = sample_lines(httpx.get(f"{server.url}/metrics").text)
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"ryzanstein_{name}"))


def test_a_client_that_takes_nothing_is_cut_off_and_can_come_back(hasty: RunningServer) -> None:
    with SlowClient(hasty) as client:
        while not client.stream_id:
            client.take(200)
        assert wait_until(lambda: metric(hasty, "slow_client_disconnects_total") == 1, timeout=30)
        assert wait_until(lambda: metric(hasty, "streams_kept ") == 1)
        assert hasty.client.num_in_flight == 0
        rest = httpx.get(f"{hasty.url}/v1/streams/{client.stream_id}", timeout=30)
    assert rest.text.endswith("data: [DONE]\n\n")
    assert metric(hasty, 'request_success_total{finished_reason="length"}') == NUM_CHOICES


def test_a_client_that_takes_little_at_a_time_is_not_cut_off(hasty: RunningServer) -> None:
    with SlowClient(hasty) as client:
        until = time.monotonic() + 2 * PATIENCE
        while time.monotonic() < until:
            client.take(512)
            time.sleep(0.05)
        client.take_all()
    assert client.received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert client.event_ids == list(range(1, client.event_ids[-1] + 1))
    assert metric(hasty, "slow_client_disconnects_total") == 0


def test_what_waits_for_a_client_is_bounded_and_goes_on_when_it_takes_it(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "MOST_UNSENT", 10_000)
    server.engine.script = lambda _: TEXT
    server.engine.holds_after = 200  # more than waits for a client, and no end
    with SlowClient(server) as client:
        while not client.stream_id:
            client.take(200)
        assert wait_until(lambda: len(server.engine.aborted) == NUM_CHOICES)  # withdrawn until there is room
        assert metric(server, "slow_client_disconnects_total") == 0
        server.engine.holds_after = None
        client.take_all()
    assert client.received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert client.event_ids == list(range(1, client.event_ids[-1] + 1))
    assert len(server.engine.requests) > NUM_CHOICES
    assert metric(server, 'request_success_total{finished_reason="length"}') == NUM_CHOICES
    assert metric(server, 'request_success_total{finished_reason="abort"}') == 0


def test_others_go_on_while_a_client_takes_nothing(hasty: RunningServer) -> None:
    with SlowClient(hasty) as client:
        client.take(200)
        answer = httpx.post(hasty.url + COMPLETIONS, json={**MANY, "n": 1}, timeout=30)
        assert answer.text.endswith("data: [DONE]\n\n")
        assert not client.received.endswith(b"[DONE]\n\n")
