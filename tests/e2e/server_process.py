"""`ryzanstein serve` as people start it, and a look at what it leaves behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

READY_SECONDS = 120.0  # generous: only a hang should exceed it


class ServerProcess:
    """A running service, its address and its process tree."""

    def __init__(self, *arguments: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ryz-e2e-", dir="/tmp")
        self._log = Path(self._folder.name) / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "server", "serve", "--port", "0", *arguments],
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": self._folder.name},
            )
        self._seen: dict[int, psutil.Process] = {}
        self.url = ""

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def run_dirs(self) -> list[Path]:
        return list(Path(self._folder.name).glob("ryzanstein-*"))

    def tree(self) -> list[psutil.Process]:
        """Every process of the service, also those whose parents have gone."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            self._seen[process.pid] = process
        return list(self._seen.values())

    def wait_ready(self) -> dict[str, Any]:
        """Wait for the banner and return what /ready says."""
        assert wait_until(lambda: "API" in self.log or self.process.poll() is not None, READY_SECONDS)
        assert self.process.poll() is None, self.log
        self.url = next(word for word in self.log.split() if word.startswith("http://")).removesuffix("/v1")
        answer: dict[str, Any] = httpx.get(f"{self.url}/ready", timeout=10).json()
        self.tree()
        return answer

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=120)

    def complete(self, **body: Any) -> dict[str, Any]:
        """Return the answer's first choice."""
        answer = self.post("/v1/completions", **body)
        answer.raise_for_status()
        choice: dict[str, Any] = answer.json()["choices"][0]
        return choice

    def metric(self, name: str) -> float:
        for line in httpx.get(f"{self.url}/metrics", timeout=10).text.splitlines():
            if line.startswith(f"ryzanstein_{name} "):
                return float(line.rsplit(" ", 1)[1])
        raise KeyError(name)

    def survivors(self, timeout: float = 1.0) -> list[psutil.Process]:
        """Return processes of the service that are alive although it has ended."""
        _, alive = psutil.wait_procs(self._seen.values(), timeout)
        return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]

    def close(self) -> None:
        if self.process.poll() is None:
            self.tree()
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for process in self.survivors():
            process.kill()
        self._folder.cleanup()


@contextmanager
def serve(*arguments: str) -> Iterator[ServerProcess]:
    """Start the service and wait until it is ready."""
    server = ServerProcess(*arguments)
    try:
        server.wait_ready()
        yield server
    finally:
        server.close()


def fails(*arguments: str) -> tuple[int, str]:
    """Run a service that should not start; return its exit code and what it wrote."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "server", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stderr


def wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    """Return whether `condition` came to hold in time."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}
