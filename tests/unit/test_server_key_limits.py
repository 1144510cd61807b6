"""What each of several keys may do, before a scripted engine."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server.api_keys import APIKey
from server.middleware.auth import MINUTE, _Account
from tests.metric_samples import sample_lines
from tests.unit.server_support import COMPLETIONS, RunningServer, ServerLog, running_server, wait_until

KEYS: list[dict[str, Any]] = [
    {"name": "free", "key": "sk-free"},
    {"name": "rated", "key": "sk-rated", "requests_per_minute": 2},
    {"name": "one", "key": "sk-one", "max_concurrent_requests": 1},
]


@pytest.fixture
def locked(model: Path, tmp_path: Path) -> Iterator[RunningServer]:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(KEYS))
    with running_server(model, api_key_file=str(path)) as server:
        yield server


def complete(server: RunningServer, key: str) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    body = {"prompt": "x", "max_tokens": 2}
    return httpx.post(server.url + COMPLETIONS, json=body, headers=headers, timeout=30)


@contextmanager
def streaming(server: RunningServer, key: str) -> Iterator[httpx.Response]:
    """Begin a stream that ends when the block does."""
    headers = {"authorization": f"Bearer {key}"}
    body = {"prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", server.url + COMPLETIONS, json=body, headers=headers, timeout=30) as answer:
        pieces = answer.iter_raw()
        next(pieces)
        yield answer


def samples(server: RunningServer, name: str) -> dict[str, float]:
    """Return a metric's values by their labels."""
    lines = sample_lines(httpx.get(f"{server.url}/metrics").text)
    found = [line for line in lines if line.startswith(f"ryzanstein_{name}{{")]
    return {line[line.index("{") + 1 : line.index("}")]: float(line.rsplit(" ", 1)[1]) for line in found}


def test_each_key_opens_the_api(locked: RunningServer) -> None:
    assert [complete(locked, key["key"]).status_code for key in KEYS] == [200, 200, 200]
    assert complete(locked, "sk-").status_code == 401


def test_requests_beyond_a_keys_rate_are_refused_until_there_is_room(locked: RunningServer) -> None:
    assert [complete(locked, "sk-rated").status_code for _ in range(2)] == [200, 200]
    with (
        openai.OpenAI(base_url=f"{locked.url}/v1", api_key="sk-rated", max_retries=0) as client,
        pytest.raises(openai.RateLimitError) as caught,
    ):
        client.models.list()
    assert caught.value.code == "rate_limit_exceeded"
    assert 50 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert "sk-rated" not in caught.value.response.text
    assert complete(locked, "sk-free").status_code == 200
    assert samples(locked, "requests_rejected_total")['reason="rate_limit_exceeded"'] == 1


def test_no_sixty_seconds_hold_more_requests_than_a_keys_rate() -> None:
    account = _Account(APIKey("a", "k", requests_per_minute=3))
    accepted = [now for now in (second / 4 for second in range(1000)) if account.refusal(now) is None]
    assert max(sum(1 for other in accepted if now <= other < now + MINUTE) for now in accepted) == 3
    assert len(accepted) == 5 * 3  # of 250 s


def test_a_key_has_no_more_answers_at_once_than_it_may(locked: RunningServer) -> None:
    locked.engine.step_seconds = 0.05
    with streaming(locked, "sk-one"):
        refused = complete(locked, "sk-one")
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "concurrency_limit_exceeded"
        assert refused.headers["retry-after"] == "1"
        assert complete(locked, "sk-free").status_code == 200
    assert wait_until(lambda: complete(locked, "sk-one").status_code == 200)


def test_whoever_comes_back_to_a_stream_counts_among_the_running_but_not_as_new() -> None:
    account = _Account(APIKey("a", "k", requests_per_minute=1, max_concurrent_requests=2))
    assert account.refusal(0.0) is None
    with account:
        assert account.refusal(1.0, is_new=False) is None
        assert (refusal := account.refusal(1.0)) is not None
        assert refusal.code == "rate_limit_exceeded"
        with account:
            assert (refusal := account.refusal(2.0, is_new=False)) is not None
            assert refusal.code == "concurrency_limit_exceeded"


def test_open_paths_do_not_count(locked: RunningServer) -> None:
    headers = {"authorization": "Bearer sk-rated"}
    for _ in range(5):
        assert httpx.get(f"{locked.url}/ready", headers=headers).status_code == 200
    assert complete(locked, "sk-rated").status_code == 200


def test_metrics_and_log_know_a_key_by_its_name_alone(locked: RunningServer, server_log: ServerLog) -> None:
    for _ in range(3):
        complete(locked, "sk-rated")
    complete(locked, "sk-free")
    server_log.wait_for(" 429 ")
    assert samples(locked, "key_requests_total") == {'key="free"': 1, 'key="rated"': 2, 'key="one"': 0}
    assert samples(locked, "key_generation_tokens_total") == {'key="free"': 2, 'key="rated"': 4, 'key="one"': 0}
    written = repr(server_log.lines) + httpx.get(f"{locked.url}/metrics").text
    assert "sk-" not in written


def test_keys_are_counted_from_zero(locked: RunningServer, idle_server: RunningServer) -> None:
    """For `increase()` a series that begins with a burst has none."""
    for name in ("requests", "prompt_tokens", "generation_tokens"):
        assert samples(locked, f"key_{name}_total") == {f'key="{key["name"]}"': 0 for key in KEYS}
        assert samples(idle_server, f"key_{name}_total") == {'key="anonymous"': 0}


def test_the_schema_says_that_there_are_limits(locked: RunningServer, idle_server: RunningServer) -> None:
    paths = httpx.get(f"{locked.url}/openapi.json").json()["paths"]
    assert "429" in paths["/v1/models"]["get"]["responses"]
    assert "429" in paths[COMPLETIONS]["post"]["responses"]
    assert "429" not in paths["/health"]["get"]["responses"]
    paths = httpx.get(f"{idle_server.url}/openapi.json").json()["paths"]
    assert "429" not in paths["/v1/models"]["get"]["responses"]
