"""The server before a scripted engine, as the tests of the API take it."""

import logging
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.unit.server_support import RunningServer, ServerLog, openai_client, running_server, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), temperature=0.5, top_p=0.9)


@pytest.fixture
def server(model: Path) -> Iterator[RunningServer]:
    with running_server(model) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai_client(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def idle_server(model: Path) -> Iterator[RunningServer]:
    """For requests that never reach the engine."""
    with running_server(model) as server:
        yield server


@pytest.fixture
def server_log() -> Iterator[ServerLog]:
    """What the server writes to its log, debugging apart."""
    log, root = ServerLog(), logging.getLogger()
    level = root.level
    root.addHandler(log)
    root.setLevel(logging.INFO)
    yield log
    root.setLevel(level)
    root.removeHandler(log)
