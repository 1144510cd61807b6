"""`ryzanstein serve org/name`: from a hub on loopback to the first token."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from engine.protocol.config import EMBEDDED_MODEL
from tests.hub import Hub, Repository, files_of
from tests.leftovers import Leftovers
from tests.service_process import ServiceProcess, wait_until

MODEL = files_of(EMBEDDED_MODEL)
SERVE = [sys.executable, "-P", "-m", "server", "serve"]
TOKEN = "hf_secret"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    big = {**MODEL, "model.safetensors": os.urandom(24 << 20)}
    repositories = {
        "org/model": Repository({"main": MODEL}, token=TOKEN),
        "org/big": Repository({"main": big}),
    }
    with Hub(repositories) as hub:
        yield hub


@pytest.fixture
def halting_hub(hub: Hub) -> Iterator[Hub]:
    """A hub that sends some of a large file, and no more."""
    hub.sent, hub.holds_after = 0, 4 << 20
    yield hub
    hub.holds_after = None
    wait_until(lambda: hub.num_sending == 0, 30)


@pytest.fixture
def leftovers() -> Iterator[Leftovers]:
    with Leftovers() as leftovers:
        yield leftovers


def test_a_model_of_the_hub_is_served_under_its_name_and_later_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    environment = {**hub.environment(tmp_path), "HF_TOKEN": TOKEN}
    with ServiceProcess("org/model", environment=environment) as service:
        assert service.complete(prompt="import ", max_tokens=2)["text"]
        (model,) = httpx.get(f"{service.url}/v1/models").json()["data"]
        assert model["id"] == "org/model"
        engine = service.descendants()
        assert engine
        assert all(TOKEN not in process.environ().values() for process in engine)
        assert TOKEN not in service.stderr
        assert "downloading org/model: " in service.stderr
    hub.asked.clear()
    with ServiceProcess("org/model", "--offline", environment=environment) as service:
        assert "downloading" not in service.stderr
    assert hub.asked == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_download_at_once_and_in_order(
    number: signal.Signals, halting_hub: Hub, tmp_path: Path, leftovers: Leftovers
) -> None:
    environment = {**os.environ, **halting_hub.environment(tmp_path), **leftovers.environment}
    process = subprocess.Popen([*SERVE, "org/big", "--port", "0"], stderr=subprocess.PIPE, text=True, env=environment)
    wait_until(lambda: any(tmp_path.rglob("*.incomplete")), 60)
    children = psutil.Process(process.pid).children(recursive=True)
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert process.returncode == 0
    assert "Traceback" not in stderr
    leftovers.check(children)


def test_a_killed_service_ends_its_download(halting_hub: Hub, tmp_path: Path, leftovers: Leftovers) -> None:
    environment = {**os.environ, **halting_hub.environment(tmp_path), **leftovers.environment}
    process = subprocess.Popen([*SERVE, "org/big", "--port", "0"], stderr=subprocess.DEVNULL, env=environment)
    wait_until(lambda: any(tmp_path.rglob("*.incomplete")), 60)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.kill()
    process.wait()
    leftovers.check(children)


def test_on_a_terminal_there_is_a_bar(halting_hub: Hub, tmp_path: Path) -> None:
    reader, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    environment = {**os.environ, **halting_hub.environment(tmp_path)}
    process = subprocess.Popen([*SERVE, "org/big", "--port", "0"], stderr=terminal, env=environment)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's end, if there was no bar
        while not re.search(rb"org/big: +\d+%\|.*/24\.0M", shown):
            shown += os.read(reader, 4096)
    process.terminate()
    code = process.wait(20)
    os.close(reader)
    assert b"/24.0M" in shown
    assert code == 0


def test_a_model_that_cannot_be_split_is_refused_before_its_weights_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.bytes_per_second = 4e6
    hub.sent = 0
    environment = {**os.environ, **hub.environment(tmp_path)}
    done = subprocess.run(
        [*SERVE, "org/big", "-tp", "5", "--port", "0"], capture_output=True, text=True, env=environment, check=False
    )
    hub.bytes_per_second = float("inf")
    assert done.returncode == 2
    assert "--tensor-parallel-size 5 does not divide" in done.stderr
    assert hub.sent < 24 << 19
