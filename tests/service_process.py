"""A real service: `ryzanstein serve` as a user starts it, on a free port."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

from tests.metric_samples import sample_lines

ROOT = Path(__file__).parents[1]
START_SECONDS = 120.0  # generous: only a hang should exceed it
REQUEST_SECONDS = 120.0


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until `condition` holds.

    Raises:
        TimeoutError: when it did not in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not happen within {seconds} s")
        time.sleep(0.02)


@contextmanager
def suspended(process: psutil.Process) -> Iterator[None]:
    """Keep a process from going on inside the block, where it may be killed."""
    process.suspend()
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.resume()


class ServiceProcess:
    """`with ServiceProcess("MODEL", "--option", "value") as service:` is READY inside the block and gone after it."""

    def __init__(
        self, *arguments: str, command: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        """Prepare `ryzanstein serve` with these arguments and a free port, or another whole `command`."""
        self._command = command or [sys.executable, "-P", "-m", "server", "serve", *arguments, "--port", "0"]
        self._environment = {**os.environ, **(environment or {})}
        self._lines: list[str] = []
        self._url_seen = threading.Event()
        self.url = ""

    @property
    def stderr(self) -> str:
        """What the service has written so far."""
        return "".join(self._lines)

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._command, stderr=subprocess.PIPE, text=True, env=self._environment, cwd=ROOT
        )
        self._reader = threading.Thread(target=self._read_stderr)
        self._reader.start()
        if not self._url_seen.wait(START_SECONDS) or not self.url:
            self.__exit__(None, None, None)
            raise RuntimeError(f"the service did not start:\n{self.stderr}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self._reader.join(20)
            assert self.process.stderr is not None
            self.process.stderr.close()

    def complete(self, **body: Any) -> dict[str, Any]:
        """Ask /v1/completions and return the answer's first choice."""
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=REQUEST_SECONDS)
        answer.raise_for_status()
        choice: dict[str, Any] = answer.json()["choices"][0]
        return choice

    def descendants(self) -> list[psutil.Process]:
        """Return the orchestrator and the ranks."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def rank_pids(self) -> list[int]:
        """Return the ranks' process ids, as /ready tells them."""
        ranks = httpx.get(f"{self.url}/ready").json()["ranks"]
        return [rank["pid"] for rank in ranks]

    def orchestrator(self) -> psutil.Process:
        """Return what starts the ranks and replaces them."""
        (process,) = psutil.Process(self.process.pid).children()
        return process

    @contextmanager
    def held(self, rank: int = 0) -> Iterator[None]:
        """Keep a rank from going on inside the block, which has to end before `--rank-timeout`.

        What is under way does not end, while the server answers.
        """
        with suspended(psutil.Process(self.rank_pids()[rank])):
            yield

    def metric(self, name: str, labels: str = "") -> float:
        """Return the sum of a metric's samples whose label text contains `labels`; 0 when there is none."""
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in sample_lines(httpx.get(f"{self.url}/metrics").text)
            if re.match(rf"{name}({{| )", line) and labels in line
        ]
        return sum(values)

    def wait_until_idle(self, checks_before: float = 0.0, seconds: float = 30.0) -> None:
        """Wait until the engine has gone idle with all KV blocks free, and found its bookkeeping whole once more."""
        wait_until(lambda: self.metric("ryzanstein_integrity_checks_total") > checks_before, seconds)
        wait_until(lambda: self.metric("ryzanstein_kv_cache_used_blocks") == 0, seconds)

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)
            if found := re.search(r"https?://[\d.]+:\d+", line):
                self.url = self.url or found[0]
                self._url_seen.set()
        self._url_seen.set()
