"""Clients that read slowly, or not at all, beside others that do not wait for them."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import pytest

from tests.service_process import ServiceProcess, wait_until

MOST_KEPT = 1 << 21  # bytes: what may wait for a client, and what has been sent of its stream
MANY: dict[str, Any] = {"prompt": "x", "n": 64, "max_tokens": 500, "ignore_eos": True, "stream": True}
FEW: dict[str, Any] = {"prompt": "def f(", "max_tokens": 60, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def service() -> Iterator[ServiceProcess]:
    with ServiceProcess() as service:
        yield service


class SlowReader:
    """`with SlowReader(service, body) as reader:` has asked for a stream, and can hold little that it has not read."""

    def __init__(self, service: ServiceProcess, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(content)}\r\n"
        self._request = f"{head}content-type: application/json\r\n\r\n".encode() + content
        self._port = int(service.url.rsplit(":", 1)[1])
        self.received = b""

    def __enter__(self) -> Self:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.settimeout(60)
        self._socket.connect(("127.0.0.1", self._port))
        self._socket.sendall(self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def read_event(self) -> None:
        """Read up to the end of the next event."""
        number = self.received.count(b"\n\n")
        while self.received.count(b"\n\n") == number:
            self.received += self._socket.recv(64)

    def read_all(self) -> None:
        """Read to the end."""
        pieces = [self.received]
        while piece := self._socket.recv(1 << 16):
            pieces.append(piece)
        self.received = b"".join(pieces)

    def check_complete(self) -> None:
        """Fail unless all events came, once and in order."""
        lines = self.received.decode().split("\n")
        numbers = [int(line.removeprefix("id: ")) for line in lines if line.startswith("id: ")]
        assert numbers == list(range(1, numbers[-1] + 1))
        assert "data: [DONE]" in lines


def test_a_client_that_reads_nothing_is_cut_off_and_its_blocks_are_free() -> None:
    with ServiceProcess("--slow-client-timeout", "2") as service, SlowReader(service, MANY) as reader:
        reader.read_event()
        wait_until(lambda: service.metric("ryzanstein_slow_client_disconnects_total") == 1, 60)
        wait_until(lambda: service.metric("ryzanstein_kv_cache_used_blocks") == 0, 30)
        assert service.complete(**FEW)["finish_reason"] == "length"


def test_what_waits_for_a_slow_client_is_bounded_and_nobody_waits_for_it(service: ServiceProcess) -> None:
    before = service.metric("ryzanstein_streams_kept_bytes")
    with SlowReader(service, MANY) as reader:
        stop = threading.Event()

        def read_now_and_then() -> None:
            while not stop.wait(0.2):
                reader.read_event()

        reading = threading.Thread(target=read_now_and_then)
        reading.start()
        with ThreadPoolExecutor(8) as pool:  # others, while the slow client's sequences are with the engine
            others = list(pool.map(lambda _: service.complete(**FEW), range(8)))
        wait_until(lambda: service.metric("ryzanstein_kv_cache_used_blocks") == 0, 60)  # out of the engine, unfinished
        assert service.metric("ryzanstein_streams_kept_bytes") - before < MOST_KEPT
        assert service.metric("ryzanstein_slow_client_disconnects_total") == 0
        stop.set()
        reading.join()
        reader.read_all()
        reader.check_complete()
    assert len({other["text"] for other in others}) == 1
    assert service.metric("ryzanstein_request_success_total", 'finished_reason="length"') >= MANY["n"] + len(others)


def test_a_client_that_reads_an_event_a_second_gets_its_stream(service: ServiceProcess) -> None:
    with SlowReader(service, {**FEW, "max_tokens": 5, "stream": True}) as reader:
        for _ in range(5):
            reader.read_event()
            time.sleep(1)
        reader.read_all()
        reader.check_complete()
    assert service.metric("ryzanstein_slow_client_disconnects_total") == 0
