import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.http_protocol import ARRIVAL_SECONDS, MAX_HEADER_SIZE, BoundedHTTPProtocol
from tests.unit.server_support import (
    COMPLETIONS,
    RunningServer,
    ServerLog,
    post,
    raw_exchange,
    running_server,
    wait_until,
)

GET = b"GET /version HTTP/1.1\r\nhost: x\r\n"
POST = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n".encode()
PATIENCE = 0.5


@pytest.fixture
def hasty(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    """A server that waits for a whole request half a second."""
    monkeypatch.setattr(BoundedHTTPProtocol, "arrival_seconds", PATIENCE)
    with running_server(model) as server:
        yield server


def connect(server: RunningServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def read_to_end(connection: socket.socket) -> bytes:
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received


def send_slowly(connection: socket.socket, data: bytes, seconds: float) -> bytes:
    """Send a byte at a time until an answer comes, which is returned whole."""
    connection.settimeout(0.02)
    deadline = time.monotonic() + seconds
    for byte in data:
        assert time.monotonic() < deadline, "nobody stops this client"
        connection.send(bytes([byte]))
        try:
            begin = connection.recv(65536)
        except TimeoutError:
            continue
        connection.settimeout(10)
        try:
            return begin + read_to_end(connection)
        except ConnectionResetError:  # it was closed with a byte on its way
            return begin
    raise AssertionError("all was sent and nothing came")


@pytest.mark.parametrize(
    "header",
    [
        b"GET /" + b"x" * MAX_HEADER_SIZE + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        GET + b"x-large: " + b"x" * MAX_HEADER_SIZE + b"\r\n\r\n",
        GET + b"".join(b"x-%d: %s\r\n" % (i, b"x" * 90) for i in range(MAX_HEADER_SIZE // 90)) + b"\r\n",
        GET + b"x-endless: " + b"x" * 1_000_000,
        POST + b"transfer-encoding: chunked\r\n\r\n0\r\n" + b"x-trailer: x\r\n" * MAX_HEADER_SIZE,
        POST + b"transfer-encoding: chunked\r\n\r\n5;extension=" + b"x" * 1_000_000,
    ],
    ids=["URL", "field", "many fields", "field without an end", "trailers", "chunk extension"],
)
def test_a_header_beyond_the_limit_is_refused(idle_server: RunningServer, header: bytes) -> None:
    with connect(idle_server) as connection:
        try:
            connection.sendall(header)
            answer = read_to_end(connection)
        except ConnectionError:  # what is sent after the answer is not waited for
            answer = b"HTTP/1.1 431"
    assert answer.startswith(b"HTTP/1.1 431")


def test_the_refusal_has_openais_shape(idle_server: RunningServer) -> None:
    header = GET + b"x-large: " + b"x" * MAX_HEADER_SIZE + b"\r\n\r\n"
    head, _, body = raw_exchange(idle_server, header).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 Request Header Fields Too Large")
    assert str(MAX_HEADER_SIZE).encode() in body
    assert b'"type":"invalid_request_error"' in body


def test_headers_up_to_the_limit_are_taken(idle_server: RunningServer) -> None:
    answer = httpx.get(f"{idle_server.url}/version", headers={"x-large": "x" * (MAX_HEADER_SIZE - 1000)})
    assert answer.status_code == 200


def test_many_small_chunks_are_no_header(server: RunningServer) -> None:
    body = b'{"prompt": [5], "max_tokens": 1' + b" " * 30_000 + b"}"
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    assert len(pieces) > 2 * MAX_HEADER_SIZE
    request = POST + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n"
    assert raw_exchange(server, request).startswith(b"HTTP/1.1 200")


def test_many_requests_on_one_connection_are_no_large_header(idle_server: RunningServer) -> None:
    count = MAX_HEADER_SIZE // len(GET) * 2
    answer = raw_exchange(idle_server, (GET + b"\r\n") * count + GET + b"connection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200") == count + 1


def test_a_slow_header_is_cut_off(hasty: RunningServer) -> None:
    with connect(hasty) as connection:
        answer = send_slowly(connection, GET * 1000, seconds=10)
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout")
    assert b"connection: close" in answer


def test_a_slow_body_is_cut_off(hasty: RunningServer, server_log: ServerLog) -> None:
    with connect(hasty) as connection:
        connection.sendall(POST + b"content-length: 10000\r\n\r\n")
        answer = send_slowly(connection, b"x" * 10000, seconds=10)
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout")
    assert "408" in server_log.wait_for("did not arrive")[1]


def test_a_body_that_goes_on_after_its_answer_is_cut_off(hasty: RunningServer) -> None:
    with connect(hasty) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 10000\r\n\r\n")
        assert read_to_end(connection).startswith(b"HTTP/1.1 404")


def test_empty_lines_hold_no_connection_open(hasty: RunningServer) -> None:
    with connect(hasty) as connection:
        connection.sendall(b"\r\n")
        assert read_to_end(connection).startswith(b"HTTP/1.1 408")


def test_a_request_may_wait_for_the_answer_before_it(hasty: RunningServer) -> None:
    """Only the client's own time counts."""
    hasty.engine.script = lambda _: "a"
    hasty.engine.step_seconds = 2 * PATIENCE
    body = b'{"prompt": [5], "max_tokens": 2}'
    request = POST + b"content-length: %d\r\n\r\n" % len(body) + body
    answer = raw_exchange(hasty, request + b"\r\n" + request + GET + b"connection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200") == 3


def test_a_request_may_arrive_slowly_while_its_client_waits_for_an_answer(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BoundedHTTPProtocol, "arrival_seconds", 2.0)
    body = b'{"prompt": [5], "max_tokens": 1}'
    with running_server(model) as server, connect(server) as connection:
        server.engine.is_paused = True
        connection.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert wait_until(lambda: len(server.engine.requests) == 1)
        connection.sendall(GET)
        time.sleep(2.5)
        server.engine.is_paused = False
        received = connection.recv(65536)
        connection.sendall(b"connection: close\r\n\r\n")
        received += read_to_end(connection)
    assert received.count(b"HTTP/1.1 200") == 2


def test_a_connection_that_says_nothing_is_closed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.http_server.KEEP_ALIVE_SECONDS", 2.0)
    with running_server(model) as server, connect(server) as silent, connect(server) as done:
        done.sendall(GET + b"\r\n")
        assert read_to_end(done).startswith(b"HTTP/1.1 200")
        assert read_to_end(silent) == b""


def test_nonsense_after_a_request_does_not_break_into_its_answer(server: RunningServer) -> None:
    server.engine.holds_after = 5
    body = b'{"prompt": [5], "max_tokens": 20, "ignore_eos": true, "stream": true}'
    with connect(server) as connection:
        connection.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        received = connection.recv(65536)
        connection.sendall(b"nonsense\r\n\r\n")
        received += read_to_end(connection)
    assert received.count(b"HTTP/1.1") == 1


def test_a_minute_is_the_limit_by_default(server: RunningServer) -> None:
    assert ARRIVAL_SECONDS == BoundedHTTPProtocol.arrival_seconds == 60
    assert post(server, COMPLETIONS, {"prompt": [5]}).status_code == 200


UPGRADES = {
    "h2c": b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n",
    "websocket": b"connection: keep-alive, Upgrade\r\nupgrade: websocket\r\n",
}
BODY = b'{"prompt": [5], "max_tokens": 1}'
LAST = GET + b"connection: close\r\n\r\n"


@pytest.mark.parametrize("is_in_one_packet", [True, False])
@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("upgrade", UPGRADES)
def test_a_wish_for_another_protocol_is_ignored_and_the_body_read(
    server: RunningServer, upgrade: str, is_chunked: bool, is_in_one_packet: bool
) -> None:
    length = b"transfer-encoding: chunked\r\n" if is_chunked else b"content-length: %d\r\n" % len(BODY)
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY) if is_chunked else BODY
    header = POST + UPGRADES[upgrade] + length + b"\r\n"
    with connect(server) as connection:
        connection.sendall(header + body if is_in_one_packet else header)
        if not is_in_one_packet:
            time.sleep(0.1)
            connection.sendall(body)
        connection.sendall(LAST)
        answer = read_to_end(connection)
    assert answer.count(b"HTTP/1.1 200") == answer.count(b"HTTP/1.1 ") == 2
    assert len(server.engine.requests) == 1


def test_a_body_of_a_request_with_an_upgrade_is_not_the_next_request(idle_server: RunningServer) -> None:
    smuggled = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    header = POST + UPGRADES["h2c"] + b"content-length: %d\r\n\r\n" % len(smuggled)
    with connect(idle_server) as connection:
        connection.sendall(header)
        time.sleep(0.1)
        connection.sendall(smuggled + LAST)
        answer = read_to_end(connection)
    assert answer.count(b"HTTP/1.1 ") == 2
    assert answer.startswith(b"HTTP/1.1 400")


def test_requests_that_want_another_protocol_follow_each_other(idle_server: RunningServer) -> None:
    request = GET + UPGRADES["h2c"] + b"\r\n"
    assert raw_exchange(idle_server, request * 3 + LAST).count(b"HTTP/1.1 200") == 4


def test_connect_is_refused_and_the_connection_closed(idle_server: RunningServer) -> None:
    answer = raw_exchange(idle_server, b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n" + LAST)
    assert answer.startswith(b"HTTP/1.1 405")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b'"type":"invalid_request_error"' in answer


def chunked(trailers: bytes) -> bytes:
    body = b"%x\r\n%s\r\n0\r\n%s\r\n" % (len(BODY), BODY, trailers)
    return POST + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n" + body


def test_a_key_in_a_trailer_opens_nothing(model: Path) -> None:
    with running_server(model, api_key="k") as server:
        answer = raw_exchange(server, chunked(b"authorization: Bearer k\r\n"))
    assert answer.startswith(b"HTTP/1.1 401")


def test_a_trailer_does_not_become_a_header(server: RunningServer) -> None:
    answer = raw_exchange(server, chunked(b"x-request-id: from-a-trailer\r\n"))
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"from-a-trailer" not in answer


def test_trailers_in_the_same_packet_as_the_body_are_bounded(idle_server: RunningServer) -> None:
    answer = raw_exchange(idle_server, chunked(b"x-trailer: x\r\n" * (MAX_HEADER_SIZE // 12)))
    assert answer.startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize("coding", [b"gzip, chunked", b"gzip\r\ntransfer-encoding: chunked"])
def test_a_coding_that_nobody_decodes_is_refused(idle_server: RunningServer, coding: bytes) -> None:
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    answer = raw_exchange(idle_server, POST + b"transfer-encoding: " + coding + b"\r\n\r\n" + body + LAST)
    assert answer.startswith(b"HTTP/1.1 501 Not Implemented")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"chunked" in answer
