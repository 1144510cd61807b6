import logging
from pathlib import Path

import httpx
import pytest

from engine.protocol.logs import LogConfig
from server.logs import REQUEST_ID, configure_logging
from server.metrics.metrics import Metrics
from tests.unit.server_support import COMPLETIONS, RunningServer, ServerLog, raw_exchange, running_server


@pytest.mark.parametrize("access_log", [True, False])
def test_ids_are_taken_or_made_whether_or_not_requests_are_logged(model: Path, access_log: bool) -> None:
    with running_server(model, access_log=access_log) as server:
        url = f"{server.url}/health"
        assert httpx.get(url, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
        made = {httpx.get(url).headers["x-request-id"] for _ in range(2)}
    assert [len(one) for one in made] == [32, 32]


@pytest.mark.parametrize("given", ["two words", "é", "x" * 129, ""])
def test_an_id_that_could_spoil_the_log_is_replaced(idle_server: RunningServer, given: str) -> None:
    headers = {b"x-request-id": given.encode()}
    assert len(httpx.get(f"{idle_server.url}/health", headers=headers).headers["x-request-id"]) == 32


def test_streams_and_errors_carry_the_id(server: RunningServer) -> None:
    headers = {"x-request-id": "mine-2"}
    for body in ({"prompt": "x", "stream": True}, {"prompt": 7}, {"prompt": "x", "model": "other"}):
        answer = httpx.post(server.url + COMPLETIONS, json=body, headers=headers)
        assert answer.headers["x-request-id"] == "mine-2"


def test_the_log_of_a_failure_and_its_message_name_the_request(
    server: RunningServer, server_log: ServerLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(Metrics, "render", fail)
    answer = httpx.get(f"{server.url}/metrics", headers={"x-request-id": "mine-3"})
    assert answer.status_code == 500
    assert "mine-3" in answer.json()["error"]["message"]
    assert server_log.wait_for("broken on purpose")[0] == "mine-3"


def test_a_line_of_the_access_log_says_who_asked_for_what_and_how_it_went(
    server: RunningServer, server_log: ServerLog
) -> None:
    headers = {"x-request-id": "mine-4"}
    httpx.post(f"{server.url}{COMPLETIONS}?secret=1", json={"prompt": "private", "max_tokens": 1}, headers=headers)
    request_id, line = server_log.wait_for(COMPLETIONS)
    assert request_id == "mine-4"
    client, method, path, status, seconds = line.split()
    assert client.startswith("127.0.0.1:")
    assert (method, path, status) == ("POST", COMPLETIONS, "200")
    assert 0 <= float(seconds.removesuffix("s")) < 60


def test_paths_that_machines_ask_often_are_for_debugging(server: RunningServer, server_log: ServerLog) -> None:
    for path in ("/health", "/ready", "/metrics"):
        httpx.get(server.url + path)
    httpx.get(f"{server.url}/version")
    server_log.wait_for("/version")
    assert len(server_log.lines) == 1


def test_no_path_can_forge_a_line(server: RunningServer, server_log: ServerLog) -> None:
    httpx.get(f"{server.url}/a%0a127.0.0.1:1%20GET%20/forged")
    assert "\n" not in server_log.wait_for("forged")[1]


def test_what_is_not_http_has_an_id_in_answer_and_log(server: RunningServer, server_log: ServerLog) -> None:
    head, _, body = raw_exchange(server, b"nonsense\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request")
    request_id = next(line for line in head.split(b"\r\n") if line.startswith(b"x-request-id")).split()[1]
    assert b'"type":"invalid_request_error"' in body
    server_log.wait_for(request_id.decode())


def test_the_configured_log_writes_the_id_into_every_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    level = logging.getLogger("uvicorn.error").level
    configure_logging(LogConfig())
    logging.getLogger("test").warning("outside")
    token = REQUEST_ID.set("mine-5")
    logging.getLogger("test").warning("inside")
    REQUEST_ID.reset(token)
    logging.getLogger("uvicorn.error").setLevel(level)
    outside, inside = capsys.readouterr().err.splitlines()
    assert outside.endswith("WARNING [-] outside")
    assert inside.endswith("WARNING [mine-5] inside")
