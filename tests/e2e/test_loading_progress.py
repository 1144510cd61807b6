"""A service whose ranks take their time to load: what it shows meanwhile, however that ends."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import httpx
import psutil
import pytest

from tests.leftovers import Leftovers
from tests.loading_group import FOLDER_VARIABLE, UNIT
from tests.service_process import ROOT, START_SECONDS, wait_until
from tests.terminal import Terminal

TOTAL = 3 * UNIT  # of two ranks
BAR = re.compile(r"loading weights:  5\d%\|.*\| 1\.\d GiB of 3\.0 GiB \[\d\d:\d\d<.*\]")


class SlowService:
    """A service of two ranks; its loading ends when it is told to."""

    def __init__(self, script: Path, leftovers: Leftovers, stderr: int) -> None:
        self._script = script
        self._leftovers = leftovers
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.loading_group", "--serve", "-tp", "2", "--port", "0"],
            cwd=ROOT,
            stderr=stderr,
            env={**os.environ, **leftovers.environment, FOLDER_VARIABLE: str(script), "TERM": "xterm"},
        )
        self._started = psutil.Process(self.process.pid)

    def tell(self, word: str) -> None:
        """Tell the ranks to `finish` or to `die`."""
        (self._script / word).touch()

    def get(self, path: str) -> httpx.Response:
        """Ask the service, which need not have said where it listens yet."""
        connections = self._started.net_connections("tcp")
        port = next(connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN)
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=30)

    def end(self, number: signal.Signals | None = None) -> int:
        """Wait until the service has ended, by a signal if there is one, and left nothing; return its exit code."""
        processes = self._started.children(recursive=True)
        if number is not None:
            self.process.send_signal(number)
        code = self.process.wait(30)
        self._leftovers.check(processes)
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)


@pytest.fixture
def leftovers() -> Iterator[Leftovers]:
    with Leftovers() as leftovers:
        yield leftovers


@contextmanager
def loading_on_a_terminal(script: Path, leftovers: Leftovers) -> Iterator[tuple[SlowService, Terminal]]:
    """A service in the middle of loading, and the terminal that shows so."""
    with Terminal() as terminal, SlowService(script, leftovers, terminal.end) as service:
        terminal.close_end()
        wait_until(lambda: any(map(BAR.fullmatch, terminal.screen)), START_SECONDS)
        yield service, terminal


def remains(terminal: Terminal) -> list[str]:
    return [line for line in terminal.screen if "loading weights" in line]


def test_a_bar_gives_way_to_the_banner(tmp_path: Path, leftovers: Leftovers) -> None:
    with loading_on_a_terminal(tmp_path, leftovers) as (service, terminal):
        service.tell("finish")
        wait_until(lambda: "/metrics)" in terminal.written, 30)
        assert terminal.screen[0] == "ryzanstein is ready"
        assert remains(terminal) == []
        assert service.end(signal.SIGTERM) == 0
    assert remains(terminal) == []


def test_a_line_of_the_log_stands_alone_above_the_bar(tmp_path: Path, leftovers: Leftovers) -> None:
    with loading_on_a_terminal(tmp_path, leftovers) as (service, terminal):
        assert service.get("/v1/models").status_code == 200
        line = re.compile(r"\S+ \S+ INFO \[\w+\] 127\.0\.0\.1:\d+ GET /v1/models 200 \S+")
        wait_until(lambda: any(map(line.fullmatch, terminal.screen)), 30)
        wait_until(lambda: any(map(BAR.fullmatch, terminal.screen[1:])), 30)
        assert service.end(signal.SIGTERM) == 0
    assert [bool(line.fullmatch(shown)) for shown in terminal.screen if shown] == [True]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_in_the_middle_leaves_no_bar(number: signal.Signals, tmp_path: Path, leftovers: Leftovers) -> None:
    with loading_on_a_terminal(tmp_path, leftovers) as (service, terminal):
        assert service.end(number) == 0
    assert [line for line in terminal.screen if line] == []


def test_a_death_in_the_middle_leaves_its_error_and_no_bar(tmp_path: Path, leftovers: Leftovers) -> None:
    with loading_on_a_terminal(tmp_path, leftovers) as (service, terminal):
        service.tell("die")
        assert service.end() == 1
    *_, line = [line for line in terminal.screen if line]
    assert re.match(r"ryzanstein: error: rank \d \(pid \d+\) was killed by SIGKILL; that was start 3 in a row", line)
    assert not any(map(BAR.fullmatch, terminal.screen))


def test_a_killed_orchestrator_is_followed_by_another_that_loads(tmp_path: Path, leftovers: Leftovers) -> None:
    with loading_on_a_terminal(tmp_path, leftovers) as (service, terminal):
        psutil.Process(service.process.pid).children()[0].kill()
        service.tell("finish")
        wait_until(lambda: "ryzanstein is ready" in terminal.written, START_SECONDS)
        assert service.end(signal.SIGTERM) == 0
    assert not any(map(BAR.fullmatch, terminal.screen))


def test_loading_shows_over_http_and_without_a_terminal_in_the_log(tmp_path: Path, leftovers: Leftovers) -> None:
    errors = tmp_path / "stderr"

    def weights_loaded() -> float:
        return float(re.findall(r"^ryzanstein_weights_loaded_ratio\S+ (\S+)$", service.get("/metrics").text, re.M)[0])

    def lines() -> list[str]:
        return re.findall(r"INFO \[-\] (loading weights: .*)\n", errors.read_text())

    with errors.open("wb") as stderr, SlowService(tmp_path, leftovers, stderr.fileno()) as service:
        wait_until(lambda: bool(lines()), START_SECONDS)
        readiness = service.get("/ready")
        assert readiness.status_code == 503
        assert readiness.json()["state"] == "STARTING"
        assert readiness.json()["total_bytes"] == TOTAL
        assert TOTAL / 2 < readiness.json()["loaded_bytes"] < TOTAL
        assert 0.5 < weights_loaded() < 1
        assert service.get("/health").status_code == 200
        service.tell("finish")
        wait_until(lambda: "ryzanstein is ready" in errors.read_text(), 30)
        assert weights_loaded() == 1
        assert "total_bytes" not in service.get("/ready").json()
        assert service.end(signal.SIGTERM) == 0
    assert re.fullmatch(r"loading weights: 1\.\d GiB of 3\.0 GiB \(5\d%\)", lines()[0])
    assert "\x1b" not in errors.read_text()


def test_a_quick_start_says_nothing_of_loading(tmp_path: Path, leftovers: Leftovers) -> None:
    (tmp_path / "finish").touch()
    with Terminal() as terminal, SlowService(tmp_path, leftovers, terminal.end) as service:
        terminal.close_end()
        wait_until(lambda: "ryzanstein is ready" in terminal.written, START_SECONDS)
        assert service.end(signal.SIGTERM) == 0
    assert "loading" not in terminal.written
    assert "\x1b" not in terminal.written
