"""`--log-format json`: whatever happens, each line of standard error is a JSON object, from every process."""

import json
import os
import signal
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.protocol.config import EMBEDDED_MODEL
from tests.hub import Hub, Repository, files_of
from tests.service_process import ServiceProcess, wait_until

KEY = "sk-secret-4712"
# The embedded model has no checksums, of which ranks warn.
TWO_RANKS = ("--tensor-parallel-size", "2", "--log-format", "json", "--verify-checksums")


def records(service: ServiceProcess) -> list[dict[str, Any]]:
    """Return every line that the service has written, parsed."""
    return [json.loads(line) for line in service.stderr.splitlines()]


def record_with(service: ServiceProcess, words: str) -> dict[str, Any]:
    """Wait for a record whose message contains `words`, and return the first."""
    wait_until(lambda: any(words in each["message"] for each in records(service)), 60)
    return next(each for each in records(service) if words in each["message"])


@pytest.fixture(scope="module")
def stderr_of_a_life() -> list[dict[str, Any]]:
    """All that a service wrote from its start over bad requests and a killed rank to its end."""
    secret = {"RYZANSTEIN_API_KEY": KEY, "RYZANSTEIN_PROT": "9"}  # the latter is no option
    with ServiceProcess(*TWO_RANKS, "--log-level", "debug", environment=secret) as service:
        headers = {"authorization": f"Bearer {KEY}", "x-request-id": "mine-7"}
        url = f"{service.url}/v1/completions?secret=query"
        assert httpx.post(url, json={"prompt": 'quoted "\n', "max_tokens": 2}, headers=headers).status_code == 200
        assert httpx.post(url, json={"prompt": 7}, headers=headers).status_code == 400
        assert httpx.post(url, json={"prompt": "x"}).status_code == 401
        os.kill(service.rank_pids()[1], signal.SIGKILL)
        record_with(service, "epoch 2 is ready")
        assert httpx.post(url, json={"prompt": "x", "max_tokens": 2}, headers=headers).status_code == 200
    return records(service)


def test_each_line_says_when_it_was_written_how_important_it_is_and_by_whom(
    stderr_of_a_life: list[dict[str, Any]],
) -> None:
    for record in stderr_of_a_life:
        assert list(record)[:5] == ["timestamp", "level", "logger", "message", "process"]
        assert record["timestamp"].endswith("Z")
        assert len(record["timestamp"]) == len("2026-01-31T12:00:00.123Z")
        assert datetime.fromisoformat(record["timestamp"]).tzinfo is not None
        assert record["level"] in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def test_the_ready_line_has_the_url_and_what_serves(stderr_of_a_life: list[dict[str, Any]]) -> None:
    (ready,) = [record for record in stderr_of_a_life if record["message"].startswith("ryzanstein is ready")]
    assert ready["url"].startswith("http://127.0.0.1:")
    assert (ready["model"], ready["tensor_parallel_size"], ready["epoch"]) == ("ryzanstein-embedded", 2, 1)


def test_requests_have_their_id_and_how_they_went_but_no_query_and_no_key(
    stderr_of_a_life: list[dict[str, Any]],
) -> None:
    lines = [record for record in stderr_of_a_life if record["logger"] == "ryzanstein.access"]
    lines = [record for record in lines if record["method"] == "POST"]
    assert [record["status"] for record in lines] == [200, 400, 401, 200]
    assert {record["path"] for record in lines} == {"/v1/completions"}
    assert [record["request_id"] == "mine-7" for record in lines] == [True, True, False, True]
    assert all(0 <= record["seconds"] < 60 for record in lines)
    written = json.dumps(stderr_of_a_life)
    assert KEY not in written
    assert "query" not in written
    assert "quoted" not in written


def test_a_lost_group_and_a_variable_that_no_option_reads_are_warnings(
    stderr_of_a_life: list[dict[str, Any]],
) -> None:
    warnings = [record["message"] for record in stderr_of_a_life if record["level"] == "WARNING"]
    assert any(message.startswith("epoch 1 is lost") and "SIGKILL" in message for message in warnings)
    assert "no option reads RYZANSTEIN_PROT" in warnings


def test_ranks_write_json_too_with_epoch_and_rank(stderr_of_a_life: list[dict[str, Any]]) -> None:
    records = [record for record in stderr_of_a_life if record["process"] == "rank"]
    assert {(record["epoch"], record["rank"]) for record in records} >= {(1, 0), (2, 0)}
    assert all(record["logger"].startswith("engine.") for record in records)


def test_what_ends_the_service_is_a_record() -> None:
    with pytest.raises(RuntimeError, match="did not start") as caught:
        ServiceProcess("/no/such/model", "--log-format", "json").__enter__()
    (line,) = str(caught.value).splitlines()[1:]
    record = json.loads(line)
    assert (record["level"], record["process"]) == ("ERROR", "server")
    assert "/no/such/model" in record["message"]


@pytest.mark.slow
def test_a_download_writes_json_too(tmp_path: Path) -> None:
    with Hub({"org/name": Repository({"main": files_of(EMBEDDED_MODEL)})}) as hub:
        environment = {**hub.environment(tmp_path), "RYZANSTEIN_LOG_FORMAT": "json"}
        with ServiceProcess("org/name", environment=environment) as service:
            assert any(record["message"].startswith("downloading org/name") for record in records(service))
