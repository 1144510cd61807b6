"""Options and fixtures of the whole suite."""

import os
import tempfile
from collections.abc import Callable

import pytest

FIGURES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the engines under test run")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = []
    caches = tempfile.TemporaryDirectory(prefix="ryzanstein-test-caches-")  # what tests start writes nothing at home
    config.add_cleanup(caches.cleanup)
    os.environ["RYZANSTEIN_SHARD_CACHE_DIR"] = f"{caches.name}/shards"
    os.environ["HF_HOME"] = f"{caches.name}/huggingface"


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
