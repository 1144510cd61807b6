"""Responses are counted by route, method and code, whatever clients ask for."""

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.metric_samples import sample_lines
from tests.unit.server_support import (
    CHAT,
    COMPLETIONS,
    RunningServer,
    post,
    running_server,
    wait_until,
    write_model,
)

KEY = "sk-secret"
HEADERS = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def server(model: Path) -> Iterator[RunningServer]:
    with running_server(model, root_path="/llm") as server:
        yield server


def responses(server: RunningServer) -> dict[tuple[str, str, str], float]:
    """Return the responses so far by route, method and code, where there were any."""
    return {labels: count for labels, count in series(server).items() if count}


def series(server: RunningServer) -> dict[tuple[str, str, str], float]:
    """Return the responses so far by route, method and code."""
    name = "ryzanstein_http_responses_total"
    lines = [line for line in sample_lines(httpx.get(f"{server.url}/metrics", headers=HEADERS).text) if name in line]
    found = {}
    for line in lines:
        labels = dict(item.split("=") for item in line[line.index("{") + 1 : line.rindex("}")].split(","))
        route, method, code = (labels[label].strip('"') for label in ("route", "method", "code"))
        found[route, method, code] = float(line.rsplit(" ", 1)[1])
    return found


def in_progress(server: RunningServer) -> float:
    lines = sample_lines(httpx.get(f"{server.url}/metrics").text)
    return next(float(line.split()[1]) for line in lines if line.startswith("ryzanstein_http_requests_in_progress "))


def test_answers_to_what_generates_are_counted_from_zero(server: RunningServer) -> None:
    """For `increase()` a series that begins with a burst has none."""
    codes = ("200", "400", "429", "500", "503", "504")
    assert series(server) == {(path, "POST", code): 0 for path in (COMPLETIONS, CHAT) for code in codes}


def test_responses_are_counted_by_route_method_and_code(server: RunningServer) -> None:
    post(server, COMPLETIONS, {"prompt": [5], "max_tokens": 2})
    post(server, COMPLETIONS, {"prompt": [5], "max_tokens": -2})
    post(server, COMPLETIONS, {"prompt": [5], "model": "other"})
    httpx.get(f"{server.url}/health")
    httpx.head(f"{server.url}/health")
    httpx.get(f"{server.url}{COMPLETIONS}")
    assert responses(server) == {
        (COMPLETIONS, "POST", "200"): 1,
        (COMPLETIONS, "POST", "400"): 1,
        (COMPLETIONS, "POST", "404"): 1,
        (COMPLETIONS, "GET", "405"): 1,
        ("/health", "GET", "200"): 1,
        ("/health", "HEAD", "200"): 1,
    }
    assert responses(server)["/metrics", "GET", "200"] == 1  # the one before


def test_whatever_clients_ask_for_there_are_few_series(server: RunningServer) -> None:
    with httpx.Client(base_url=server.url) as client:
        for index in range(20):
            client.get(f"/nothing/{index}")
            client.get(f"/v1/models/m{index}")
            client.get(f"/v1/streams/s{index}")
            client.request(["PATCH", "PUT", "TRACE", "PROPFIND"][index % 4], "/health")
            client.get(f"/docs/assets/{index}")
    assert responses(server) == {
        ("unknown", "GET", "404"): 20,
        ("/v1/models/{name}", "GET", "404"): 20,
        ("/v1/streams/{stream_id}", "GET", "404"): 20,
        ("/health", "other", "405"): 20,
        ("/docs/assets/{path}", "GET", "404"): 20,
    }


def test_refusals_of_middleware_are_counted(model: Path) -> None:
    with running_server(model, api_key=KEY, max_body_size=1000) as server:
        post(server, COMPLETIONS, {"prompt": [5]})
        httpx.post(f"{server.url}{COMPLETIONS}", json={"prompt": "x" * 2000}, headers=HEADERS)
        httpx.get(f"{server.url}/somewhere")
        assert responses(server) == {
            (COMPLETIONS, "POST", "401"): 1,
            (COMPLETIONS, "POST", "413"): 1,
            ("unknown", "GET", "401"): 1,
        }


def test_a_stream_is_in_progress_until_it_ends(server: RunningServer) -> None:
    server.engine.holds_after = 5
    body = {"prompt": "x", "stream": True, "max_tokens": 20, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}{COMPLETIONS}", json=body, timeout=30) as stream:
        events = stream.iter_lines()
        next(events)
        assert in_progress(server) == 2  # and the one that asks
        assert (COMPLETIONS, "POST", "200") not in responses(server)
        server.engine.holds_after = None
        assert list(events)[-2] == "data: [DONE]"
    assert wait_until(lambda: in_progress(server) == 1)
    assert responses(server)[COMPLETIONS, "POST", "200"] == 1


def test_a_client_that_leaves_before_the_answer_begins_is_499(server: RunningServer) -> None:
    server.engine.is_paused = True
    address = urlsplit(server.url)
    body = b'{"prompt": [5], "max_tokens": 2}'
    with socket.create_connection((address.hostname, address.port)) as client:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert wait_until(lambda: in_progress(server) == 2)
    assert wait_until(lambda: responses(server).get((COMPLETIONS, "POST", "499")) == 1)
