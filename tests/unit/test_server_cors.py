from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.metrics.metrics import Metrics
from tests.unit.server_support import COMPLETIONS, RunningServer, running_server

ORIGIN = "https://app.example"
ALLOW = "access-control-allow-origin"


@pytest.fixture(scope="module")
def locked(model: Path) -> Iterator[RunningServer]:
    with running_server(model, api_key="k", max_body_size=1000, allowed_origins=(ORIGIN,)) as server:
        yield server


def preflight(server: RunningServer, origin: str = ORIGIN, **headers: str) -> httpx.Response:
    asked = {"origin": origin, "access-control-request-method": "POST", **headers}
    return httpx.options(server.url + COMPLETIONS, headers=asked)


def test_pages_of_other_origins_are_not_let_in_unless_asked_for(idle_server: RunningServer) -> None:
    answer = httpx.get(f"{idle_server.url}/v1/models", headers={"origin": ORIGIN})
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert preflight(idle_server).status_code == 405


def test_a_preflight_needs_no_key(locked: RunningServer) -> None:
    answer = preflight(locked, **{"access-control-request-headers": "authorization,content-type,x-stainless-os"})
    assert answer.status_code == 200
    assert answer.headers[ALLOW] == ORIGIN
    assert "x-stainless-os" in answer.headers["access-control-allow-headers"]


def test_other_origins_stay_out(locked: RunningServer) -> None:
    refusal = preflight(locked, "https://evil.example")
    assert refusal.status_code == 400
    assert refusal.json()["error"] == {
        "message": "Disallowed CORS origin.",
        "type": "invalid_request_error",
        "param": None,
        "code": "cors_refused",
    }
    assert ALLOW not in refusal.headers
    assert "origin" in refusal.headers["vary"].lower()
    answer = httpx.get(f"{locked.url}/health", headers={"origin": "https://evil.example"})
    assert ALLOW not in answer.headers


def test_pages_may_read_answers_errors_and_request_ids(locked: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(Metrics, "render", fail)
    origin, key = {"origin": ORIGIN}, {"authorization": "Bearer k"}
    answers = {
        200: httpx.get(f"{locked.url}/v1/models", headers={**origin, **key}),
        401: httpx.get(f"{locked.url}/v1/models", headers=origin),
        404: httpx.get(f"{locked.url}/nowhere", headers={**origin, **key}),
        413: httpx.post(locked.url + COMPLETIONS, content=b"x" * 2000, headers={**origin, **key}),
        500: httpx.get(f"{locked.url}/metrics", headers=origin),
    }
    for status, answer in answers.items():
        assert answer.status_code == status
        assert answer.headers[ALLOW] == ORIGIN
        assert answer.headers["x-request-id"]
        assert "x-request-id" in answer.headers["access-control-expose-headers"]


def test_any_origin_can_be_allowed(model: Path) -> None:
    with running_server(model, allowed_origins=("*",)) as server:
        assert httpx.get(f"{server.url}/health", headers={"origin": "https://any.example"}).headers[ALLOW] == "*"


def test_methods_headers_and_credentials_are_allowed_as_said(model: Path) -> None:
    with running_server(
        model, allowed_origins=(ORIGIN,), allowed_methods=("GET",), allowed_headers=("x-mine",), allow_credentials=True
    ) as server:
        assert preflight(server).status_code == 400
        assert preflight(server, **{"access-control-request-method": "GET"}).status_code == 200
        headers = {"access-control-request-method": "GET", "access-control-request-headers": "x-other"}
        assert preflight(server, **headers).status_code == 400
        answer = httpx.get(f"{server.url}/health", headers={"origin": ORIGIN})
    assert answer.headers["access-control-allow-credentials"] == "true"
