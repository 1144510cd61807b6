"""Containers without a daemon: a place of their own for images, networks and processes, of which nothing is left."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.container.tools import SEARCH_PATH
from tests.service_process import wait_until

COMMAND_SECONDS = 120.0  # generous: only a hang should exceed it
CONTAINERS_CONF = """\
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]

[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"

[network]
network_backend = "netavark"
"""
STORAGE_CONF = """\
[storage]
driver = "overlay"
graphroot = "{folder}/images"
runroot = "{folder}/run"
"""
# What is started in it has networks, mounts and process numbers of its own, and ends with its first process: a shell in
# a loop, since it reaps what the others leave.
NAMESPACE = """\
set -eu
ip link set lo up
for folder in /run /dev/shm; do mount -t tmpfs tmpfs "$folder"; done
echo ready
while :; do sleep 3600; done
"""
# What the pages call docker, where there is none.
DOCKER = """\
#!/bin/sh
if [ "$1" = compose ]; then shift; exec "{python}" -m podman_compose "$@"; fi
exec podman "$@"
"""


class CommandFailedError(Exception):
    """A command that ended with another exit code than 0."""


class Containers:
    """`with Containers(folder) as containers:` runs podman and what it starts in namespaces that are gone after it.

    Args:
        folder: not in the way of anything, on a file system that overlays can lie on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "containers.conf").write_text(CONTAINERS_CONF)
        (folder / "storage.conf").write_text(STORAGE_CONF.format(folder=folder))
        programs = folder / "programs"
        programs.mkdir()
        (programs / "docker").write_text(DOCKER.format(python=sys.executable))
        (programs / "docker").chmod(0o755)
        (folder / "tmp").mkdir()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "RYZANSTEIN_"))}
        self.environment = {
            **kept,
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "PATH": f"{programs}:{SEARCH_PATH}",
            "TMPDIR": str(folder / "tmp"),
        }

    def __enter__(self) -> Self:
        unshare = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._namespace = subprocess.Popen(
            [*unshare, "bash", "-c", NAMESPACE], stdout=subprocess.PIPE, env=self.environment
        )
        assert self._namespace.stdout is not None
        if self._namespace.stdout.readline() != b"ready\n":
            raise RuntimeError("there are no namespaces to be had here")
        children = Path(f"/proc/{self._namespace.pid}/task/{self._namespace.pid}/children").read_text().split()
        self._first = int(children[0])
        self._enter = ["nsenter", "--target", children[0], "--net", "--mount", "--pid", "--"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.kill(self._first, signal.SIGKILL)  # and with it, by the kernel, all that was started there
        self._namespace.wait()
        assert self._namespace.stdout is not None
        self._namespace.stdout.close()
        _unmount_below(self.folder)
        shutil.rmtree(self.folder)

    def outside(self, *command: str, seconds: float = COMMAND_SECONDS, cwd: Path | None = None) -> str:
        """Run a command with this machine's network, and return what it writes to standard output.

        Raises:
            CommandFailedError: with what it writes to standard error.
        """
        return _run(command, self.environment, seconds, cwd)

    def inside(self, *command: str, seconds: float = COMMAND_SECONDS, cwd: Path | None = None) -> str:
        """Run a command where the containers are, with their network, as `outside` does."""
        change = [] if cwd is None else ["sh", "-c", 'cd "$0" && exec "$@"', str(cwd)]  # who enters mounts begins at /
        return _run([*self._enter, *change, *command], self.environment, seconds, None)

    def start_inside(self, *command: str, stdout: int = subprocess.PIPE) -> "subprocess.Popen[str]":
        """Start a command where the containers are, and return it."""
        return subprocess.Popen([*self._enter, *command], env=self.environment, stdout=stdout, text=True)

    def ask(self, url: str, **body: Any) -> Any:
        """Ask a service by its address there, by POST where there is a body, and return the answer, parsed."""
        program = (
            "import sys, urllib.request\n"
            "url, body = sys.argv[1], sys.argv[2].encode() or None\n"
            "request = urllib.request.Request(url, body, {'Content-Type': 'application/json'})\n"
            "sys.stdout.buffer.write(urllib.request.urlopen(request, timeout=60).read())\n"
        )
        return json.loads(self.inside(sys.executable, "-c", program, url, json.dumps(body) if body else ""))

    def inspect(self, name: str) -> dict[str, Any]:
        """Return what podman knows of a container or an image."""
        found: list[dict[str, Any]] = json.loads(self.inside("podman", "inspect", name))
        return found[0]

    def is_healthy(self, name: str) -> bool:
        """Run the health check of a container once, as a daemon would from time to time."""
        try:
            self.inside("podman", "healthcheck", "run", name)
        except CommandFailedError:
            return False
        return True

    def wait_until_healthy(self, name: str) -> None:
        """Wait until the health check of a container passes.

        Raises:
            TimeoutError: with its log, if it does not in time.
        """
        try:
            wait_until(lambda: self.is_healthy(name), COMMAND_SECONDS)
        except TimeoutError:
            raise TimeoutError(f"{name} did not become healthy:\n{self.logs(name)}") from None

    def logs(self, name: str) -> str:
        """Return what a container has written, to either stream."""
        return self.inside("sh", "-c", 'exec podman logs "$0" 2>&1', name)

    def remove(self, name: str) -> None:
        """Remove a container and its anonymous volumes, at once."""
        self.inside("podman", "rm", "--force", "--time", "0", "--volumes", name)


def _unmount_below(folder: Path) -> None:
    """Unmount what programs that were killed have left mounted there."""
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for path in reversed(mounted):
        if path.startswith(f"{folder}/"):
            subprocess.run(["umount", "--lazy", path], check=False, capture_output=True)


def _run(command: Sequence[str], environment: dict[str, str], seconds: float, cwd: Path | None) -> str:
    done = subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=seconds, check=False
    )
    if done.returncode != 0:
        shown = f"{done.stdout[-4000:]}{done.stderr[-8000:]}"
        raise CommandFailedError(f"{' '.join(command)} ended with {done.returncode}:\n{shown}")
    return done.stdout
