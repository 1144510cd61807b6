import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.unit.server_support import COMPLETIONS, RunningServer, post, raw_exchange, running_server

LIMIT = 10_000
HEAD = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
ONE_TOKEN = json.dumps({"prompt": [5], "max_tokens": 1}).encode()


@pytest.fixture(scope="module")
def limited(model: Path) -> Iterator[RunningServer]:
    with running_server(model, max_body_size=LIMIT) as server:
        yield server


def connect(server: RunningServer) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)


def chunks(count: int, size: int = 1000) -> Iterator[bytes]:
    return (b"x" * size for _ in range(count))


def body_of(size: int) -> bytes:
    """Return a valid body of so many bytes."""
    return ONE_TOKEN + b" " * (size - len(ONE_TOKEN))


def test_a_body_of_the_limit_is_taken_and_one_byte_more_is_not(limited: RunningServer) -> None:
    headers = {"content-type": "application/json"}
    statuses = [
        httpx.post(limited.url + COMPLETIONS, content=body_of(size), headers=headers).status_code
        for size in (LIMIT, LIMIT + 1)
    ]
    assert statuses == [200, 413]


def test_the_answer_says_the_limit_in_openais_shape(limited: RunningServer) -> None:
    answer = post(limited, COMPLETIONS, {"prompt": "x" * LIMIT})
    assert answer.status_code == 413
    error = answer.json()["error"]
    assert str(LIMIT) in error.pop("message")
    assert error == {"type": "invalid_request_error", "param": None, "code": "body_too_large"}


def test_an_announced_size_is_refused_before_anything_is_sent(limited: RunningServer) -> None:
    host, port = limited.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"{HEAD}content-length: {LIMIT + 1}\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_body_without_an_announced_size_is_counted(limited: RunningServer) -> None:
    headers = {"content-type": "application/json"}
    assert httpx.post(limited.url + COMPLETIONS, content=chunks(11), headers=headers).status_code == 413
    body = body_of(LIMIT)
    pieces = (body[begin : begin + 999] for begin in range(0, LIMIT, 999))
    assert httpx.post(limited.url + COMPLETIONS, content=pieces, headers=headers).status_code == 200


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/models", "/nowhere"])
@pytest.mark.parametrize("close", [True, False])
def test_a_client_that_sends_everything_before_it_reads_gets_its_answer(
    limited: RunningServer, path: str, close: bool
) -> None:
    connection = connect(limited)
    headers = {"connection": "close"} if close else {}
    connection.request("POST", path, body=b"x" * 20_000_000, headers=headers)
    answer = connection.getresponse()
    assert answer.status == {COMPLETIONS: 413, "/v1/models": 405, "/nowhere": 404}[path]
    assert json.loads(answer.read())["error"]["message"]
    connection.close()


def test_the_connection_goes_on_after_a_body_that_was_too_large(limited: RunningServer) -> None:
    connection = connect(limited)
    for _ in range(2):
        connection.request("POST", COMPLETIONS, body=chunks(1000), encode_chunked=True)
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (413, True)
        same = connection.sock
        connection.request("POST", COMPLETIONS, body=ONE_TOKEN, headers={"content-type": "application/json"})
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (200, True)
        assert connection.sock is same
    connection.close()


def test_a_request_within_a_refused_body_is_never_served(limited: RunningServer) -> None:
    smuggled = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n" * 1000
    head = f"{HEAD}connection: close\r\ncontent-length: {len(smuggled)}\r\n\r\n"
    answer = raw_exchange(limited, head.encode() + smuggled)
    assert answer.count(b"HTTP/1.1") == 1
    assert answer.startswith(b"HTTP/1.1 413")


def test_a_client_that_waits_for_leave_to_send_is_told_at_once(limited: RunningServer) -> None:
    answer = raw_exchange(limited, f"{HEAD}expect: 100-continue\r\ncontent-length: 999999\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer


def test_a_client_that_waits_for_leave_to_send_gets_it(limited: RunningServer) -> None:
    head = f"{HEAD}connection: close\r\nexpect: 100-continue\r\ncontent-length: {len(ONE_TOKEN)}\r\n\r\n"
    answer = raw_exchange(limited, head.encode() + ONE_TOKEN)
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")


def test_a_client_that_leaves_within_its_body_does_no_harm(limited: RunningServer) -> None:
    host, port = limited.url.removeprefix("http://").split(":")
    for announced in (100, LIMIT + 1):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(f"{HEAD}content-length: {announced}\r\n\r\nxx".encode())
    assert post(limited, COMPLETIONS, {"prompt": [5]}).status_code == 200


def test_sixteen_mebibytes_are_the_default(idle_server: RunningServer) -> None:
    headers = {"content-type": "application/json"}
    url = idle_server.url + COMPLETIONS
    assert httpx.post(url, content=body_of(16 * 2**20), headers=headers, timeout=30).status_code == 200
    assert httpx.post(url, content=body_of(16 * 2**20 + 1), headers=headers, timeout=30).status_code == 413
