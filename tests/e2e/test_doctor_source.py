"""`ryzanstein doctor` finds the model where `ryzanstein serve` does, and downloads nothing."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.protocol.config import EMBEDDED_MODEL
from server.model_source.config import ModelSourceConfig
from server.model_source.hub import download
from tests.hub import Hub, Repository, files_of

RYZANSTEIN = [sys.executable, "-P", "-m", "server"]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub({"org/model": Repository({"main": files_of(EMBEDDED_MODEL)})}) as hub:
        yield hub


@pytest.fixture(autouse=True)
def cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on this machine; what is started in the test asks the hub on loopback."""
    for name, value in hub.environment(tmp_path / "huggingface").items():
        monkeypatch.setenv(name, value)
    return tmp_path / "huggingface"


def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RYZANSTEIN, command, *arguments, "--port", "0"], check=False, capture_output=True, text=True, timeout=120
    )


def examine(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code, and the checks by name."""
    done = run("doctor", "--json", *arguments)
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def test_of_a_model_that_is_not_here_it_says_how_much_there_is_to_download(hub: Hub, cache: Path) -> None:
    hub.sent = 0
    code, checks = examine("org/model")
    assert code == 0
    assert checks["model"]["status"] == "warning"
    assert checks["model"]["detail"].startswith("org/model is not here yet: serving downloads 10.")
    assert set(checks) == {"model", "shard cache", "API key and TLS", "port"}
    assert hub.sent == 0
    assert not cache.exists()


def test_of_a_model_that_is_here_it_checks_everything(hub: Hub) -> None:
    directory = download("org/model", ModelSourceConfig(), bool)
    hub.asked.clear()
    code, checks = examine("org/model")
    assert code == 0
    assert checks["model"]["detail"] == str(directory)
    assert checks["model files"]["detail"].startswith("org/model: config.json")
    assert checks["tensors"]["status"] == "ok"
    assert hub.asked == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("org/model", "--offline"), "not in the cache of the hub"),
        (("org/model", "--revision", "v9"), "has no revision v9"),
        (("nowhere",), "model: nowhere is not a directory, nor a name on the hub such as org/name"),
    ],
)
def test_what_cannot_be_found_fails_in_both_and_in_the_same_words(arguments: tuple[str, ...], words: str) -> None:
    served, (code, checks) = run("serve", *arguments), examine(*arguments)
    assert (served.returncode, code) == (2, 2)
    assert words in served.stderr
    assert checks["model"]["status"] == "failure"
    assert served.stderr == f"ryzanstein: error: {checks['model']['detail']}\n"
