"""A real service: `ryzanstein serve` as a user starts it, on a free port."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import httpx
import psutil

START_SECONDS = 120.0  # generous: only a hang should exceed it


class ServiceProcess:
    """`with ServiceProcess("MODEL", "--option", "value") as service:` is READY inside the block and gone after it."""

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self._arguments = arguments
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
            [sys.executable, "-P", "-m", "server", "serve", *self._arguments, "--port", "0"],
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment,
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

    def client(self) -> httpx.Client:
        """Return an HTTP client with the service's address as its base."""
        return httpx.Client(base_url=self.url, timeout=60)

    def descendants(self) -> list[psutil.Process]:
        """Return the orchestrator and the ranks."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def rank_pids(self) -> list[int]:
        """Return the ranks' process ids, as /ready tells them."""
        ranks = httpx.get(f"{self.url}/ready").json()["ranks"]
        return [rank["pid"] for rank in ranks]

    def metric(self, name: str, labels: str = "") -> float:
        """Return the sum of a metric's samples whose label text contains `labels`."""
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in httpx.get(f"{self.url}/metrics").text.splitlines()
            if re.match(rf"{name}({{| )", line) and labels in line
        ]
        if not values:
            raise KeyError(f"{name} {labels}")
        return sum(values)

    def wait_for_integrity_check(self, seconds: float = 30.0) -> None:
        """Wait until the engine has gone idle with all KV blocks free, and found its bookkeeping whole."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            is_checked = self.metric("ryzanstein_integrity_checks_total") > 0
            if is_checked and self.metric("ryzanstein_kv_cache_used_blocks") == 0:
                return
            time.sleep(0.2)
        raise TimeoutError("the engine did not go idle, or a KV block leaked")

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)
            if found := re.search(r"http://[\d.]+:\d+", line):
                self.url = self.url or found[0]
                self._url_seen.set()
        self._url_seen.set()
