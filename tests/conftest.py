"""Options and fixtures of the whole suite."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import httpx._config
import pytest
from hypothesis import settings

from engine.protocol.config import KERNELS
from tests.kernels import KERNELS_VARIABLE, usable_kernels

FIGURES = pytest.StashKey[list[str]]()
ANSWER_SECONDS = 60.0  # for what states no time of its own: only a hang should exceed it

settings.register_profile("patient", settings(), deadline=None)  # no property is one of time
settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the engines under test run")
    parser.addoption("--kernels", default="auto", choices=KERNELS, help="what the engines under test compute with")


def pytest_configure(config: pytest.Config) -> None:
    waits = httpx._config.DEFAULT_TIMEOUT_CONFIG  # 5 s, which a busy machine takes now and then
    waits.connect = waits.read = waits.write = waits.pool = ANSWER_SECONDS
    config.stash[FIGURES] = []
    caches = tempfile.TemporaryDirectory(prefix="ryzanstein-test-caches-")  # what tests start writes nothing at home
    config.add_cleanup(caches.cleanup)
    os.environ["RYZANSTEIN_SHARD_CACHE_DIR"] = f"{caches.name}/shards"
    os.environ["HF_HOME"] = f"{caches.name}/huggingface"
    if (kernels := config.getoption("--kernels")) != "auto":
        os.environ[KERNELS_VARIABLE] = kernels


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what asks for it with all that this machine can compute with, or with `--kernels` alone.

    `each_kernels` are the instruction sets and torch, `each_instruction_set` are those of the C++ kernels.
    """
    asked: str = metafunc.config.getoption("--kernels")
    names = usable_kernels() if asked == "auto" else [asked]
    if "each_kernels" in metafunc.fixturenames:
        metafunc.parametrize("each_kernels", names, scope="session")
    if "each_instruction_set" in metafunc.fixturenames:
        sets = [name for name in names if name != "torch"]
        metafunc.parametrize("each_instruction_set", sets, scope="session")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where pytest-xdist runs the tests in several processes, send each one's figures to the first."""
    output: dict[str, list[str]] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["figures"] = session.config.stash[FIGURES]


def pytest_testnodedown(node: Any) -> None:
    output: dict[str, list[str]] = getattr(node, "workeroutput", {})  # none, if it crashed
    node.config.stash[FIGURES].extend(output.get("figures", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[FIGURES]:
        terminalreporter.section("figures")
        for line in config.stash[FIGURES]:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    device: str = request.config.getoption("--device")
    return device


@pytest.fixture(scope="session")
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Show a line at the end of the run, passed or not: what a test counted."""
    return request.config.stash[FIGURES].append
