from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.unit.server_support import (
    CHAT,
    COMPLETIONS,
    RunningServer,
    ServerLog,
    openai_client,
    raw_exchange,
    running_server,
)

KEY = "sk-secret-1"
OPEN_PATHS = ("/health", "/ready", "/metrics", "/version", "/docs", "/docs/assets/swagger-ui.css", "/openapi.json")


@pytest.fixture(scope="module")
def locked(model: Path) -> Iterator[RunningServer]:
    with running_server(model, api_key=KEY) as server:
        yield server


def test_the_right_key_opens_the_api(locked: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEY, max_retries=0) as client:
        assert client.models.list().data[0].id == "scripted"
        assert client.completions.create(model="scripted", prompt="x").choices[0].text


def test_another_key_is_openais_authentication_error(locked: RunningServer) -> None:
    with openai_client(locked.url) as client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"
    assert caught.value.response.headers["www-authenticate"] == "Bearer"
    assert caught.value.response.headers["x-request-id"]


@pytest.mark.parametrize(
    "path", [COMPLETIONS, CHAT, "/v1/models", "/v1/models/scripted", "/tokenize", "/detokenize", "/", "/new", "/Health"]
)
def test_all_but_the_open_paths_need_the_key(locked: RunningServer, path: str) -> None:
    for method in ("GET", "POST"):
        answer = httpx.request(method, locked.url + path)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_every_operation_of_the_schema_is_either_listed_as_open_or_needs_the_key(locked: RunningServer) -> None:
    paths = httpx.get(f"{locked.url}/openapi.json").json()["paths"]
    reached = {
        path
        for path, operations in paths.items()
        for method in operations
        if httpx.request(method, locked.url + path.replace("{name}", "scripted")).status_code != 401
    }
    assert reached <= set(OPEN_PATHS)


@pytest.mark.parametrize("path", OPEN_PATHS)
def test_open_paths_need_none(locked: RunningServer, path: str) -> None:
    assert httpx.get(locked.url + path).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/docs/assets/../../v1/models", "/docs/assets/%2e%2e/%2e%2e/v1/models", "//v1/models", "/health/../v1/models"],
)
def test_no_way_of_writing_a_path_leads_around_the_key(locked: RunningServer, path: str) -> None:
    answer = raw_exchange(locked, f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    assert b"scripted" not in answer
    assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 404"))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_is_written_as_one_likes(locked: RunningServer, scheme: str) -> None:
    assert httpx.get(f"{locked.url}/v1/models", headers={"authorization": f"{scheme} {KEY}"}).status_code == 200


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", KEY, f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Bearer {KEY} {KEY}"],
)
def test_what_is_not_exactly_the_key_is_refused(locked: RunningServer, authorization: str) -> None:
    headers = {"authorization": authorization}
    assert httpx.get(f"{locked.url}/v1/models", headers=headers).status_code == 401


def test_bytes_that_are_not_text_are_refused(locked: RunningServer) -> None:
    headers = {b"authorization": b"Bearer \xff\xfe\xe9"}
    assert httpx.get(f"{locked.url}/v1/models", headers=headers).status_code == 401


def test_two_authorizations_are_none(locked: RunningServer) -> None:
    headers = [("authorization", f"Bearer {KEY}"), ("authorization", "Bearer other")]
    assert httpx.get(f"{locked.url}/v1/models", headers=headers).status_code == 401


def test_neither_key_nor_prompt_nor_query_is_logged(locked: RunningServer, server_log: ServerLog) -> None:
    for key in (KEY, "sk-wrong"):
        headers = {"authorization": f"Bearer {key}"}
        body = {"prompt": "private words", "max_tokens": 2}
        httpx.post(f"{locked.url}{COMPLETIONS}?token=in-query", json=body, headers=headers)
    server_log.wait_for(" 200 ")
    server_log.wait_for(" 401 ")
    written = repr(server_log.lines)
    assert not any(secret in written for secret in (KEY, "sk-wrong", "private", "in-query"))


def test_the_server_without_a_key_is_open(idle_server: RunningServer) -> None:
    assert httpx.get(f"{idle_server.url}/v1/models").status_code == 200


def test_the_schema_says_what_needs_the_key(locked: RunningServer, idle_server: RunningServer) -> None:
    schema = httpx.get(f"{locked.url}/openapi.json").json()
    assert schema["components"]["securitySchemes"] == {"API key": {"type": "http", "scheme": "bearer"}}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert ("401" in operation["responses"]) == (path not in OPEN_PATHS) == ("security" in operation)
    assert "securitySchemes" not in httpx.get(f"{idle_server.url}/openapi.json").json()["components"]
