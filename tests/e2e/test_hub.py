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
    number: signal.Signals, hub: Hub, tmp_path: Path, leftovers: Leftovers
) -> None:
    hub.bytes_per_second = 4e6
    environment = {**os.environ, **hub.environment(tmp_path), **leftovers.environment}
    process = subprocess.Popen([*SERVE, "org/big", "--port", "0"], stderr=subprocess.PIPE, text=True, env=environment)
    wait_until(lambda: any(tmp_path.rglob("*.incomplete")), 60)
    children = psutil.Process(process.pid).children(recursive=True)
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert time.monotonic() - began < 15  # and not the drain time-out
    assert process.returncode == 0
    assert "Traceback" not in stderr
    leftovers.check(children)
    hub.bytes_per_second = float("inf")


def test_a_killed_service_ends_its_download(hub: Hub, tmp_path: Path, leftovers: Leftovers) -> None:
    hub.bytes_per_second = 4e6
    environment = {**os.environ, **hub.environment(tmp_path), **leftovers.environment}
    process = subprocess.Popen([*SERVE, "org/big", "--port", "0"], stderr=subprocess.DEVNULL, env=environment)
    wait_until(lambda: any(tmp_path.rglob("*.incomplete")), 60)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.kill()
    process.wait()
    leftovers.check(children)
    hub.bytes_per_second = float("inf")


def test_on_a_terminal_there_is_a_bar(hub: Hub, tmp_path: Path) -> None:
    reader, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    hub.bytes_per_second = 4e6
    environment = {**os.environ, **hub.environment(tmp_path)}
    process = subprocess.Popen([*SERVE, "org/big", "--port", "0"], stderr=terminal, env=environment)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's end, if there was no bar
        while not re.search(rb"org/big: +\d+%\|.*/24\.0M", shown):
            shown += os.read(reader, 4096)
    process.terminate()
    code = process.wait(20)
    os.close(reader)
    hub.bytes_per_second = float("inf")
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
