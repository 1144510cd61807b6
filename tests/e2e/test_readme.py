"""Every command in the README, as it stands there."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.protocol.config import EMBEDDED_MODEL
from tests.service_process import ServiceProcess

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def block_with(language: str, words: str) -> str:
    (found,) = [block for block in blocks(language) if words in block]
    return found


def run_block(block: str, url: str) -> str:
    """Run a bash block against a service at another address, and return what it prints."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.replace(ADDRESS, url)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def service() -> Iterator[ServiceProcess]:
    with ServiceProcess() as service:
        yield service


def test_the_first_curl_prints_a_completion(service: ServiceProcess) -> None:
    answer = run_block(block_with("bash", "curl"), service.url)
    assert '"object":"text_completion"' in answer
    assert '"finish_reason":"' in answer


def test_the_official_clients_example_prints_a_completion(service: ServiceProcess) -> None:
    program = block_with("python", "openai").replace(ADDRESS, service.url)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip()


@pytest.mark.skipif(not (ROOT / ".venv/.installed").exists(), reason="the suite runs outside of make's .venv")
def test_make_serve_serves_the_embedded_model() -> None:
    assert blocks("bash")[0] == "make serve\n"
    with ServiceProcess(command=("make", "--silent", "serve"), environment={"RYZANSTEIN_PORT": "0"}) as service:
        assert "ryzanstein-embedded" in service.stderr
        assert service.complete(prompt="import ", max_tokens=4)["text"]


@pytest.mark.skipif(not (ROOT / ".venv/.installed").exists(), reason="the suite runs outside of make's .venv")
def test_the_command_for_a_model_of_yours_serves_it() -> None:
    command = block_with("bash", "path/to/model").replace("path/to/model", str(EMBEDDED_MODEL)).split()
    with ServiceProcess(command=command, environment={"RYZANSTEIN_PORT": "0"}) as service:
        assert len(service.rank_pids()) == 2


@pytest.mark.skipif(not (ROOT / ".venv/.installed").exists(), reason="the suite runs outside of make's .venv")
def test_the_doctor_finds_that_the_embedded_model_can_be_served() -> None:
    command = block_with("bash", "ryzanstein doctor").split()
    environment = {**os.environ, "RYZANSTEIN_PORT": "0"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("Serving would start.\n")


def test_make_test_is_the_command_that_ci_runs() -> None:
    assert "make test\n" in blocks("bash")
    assert "make test" in (ROOT / ".ci/run").read_text()
    plan = subprocess.run(["make", "--dry-run", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for tool in ("ruff check", "ruff format --check", "mypy", "pytest"):
        assert tool in plan


@pytest.mark.skipif(not (ROOT / ".venv/.installed").exists(), reason="the suite runs outside of make's .venv")
def test_make_install_does_nothing_when_it_has_been_done() -> None:
    variables = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(["make", "install"], cwd=ROOT, capture_output=True, text=True, check=True, env=variables)
    assert "Nothing to be done" in done.stdout


def test_every_path_that_the_pages_link_to_is_there() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
