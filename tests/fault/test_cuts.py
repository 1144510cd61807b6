"""What connects processes breaks, or there is no room for it: a pause where it can be mended, else one clear line."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.disks import mounted_disk
from tests.fault.crowd import Crowd
from tests.fault.test_chaos import EXACT, RANK_TIMEOUT, bodies, check, ready_of, undisturbed
from tests.leftovers import still_running
from tests.service_process import ServiceProcess, suspended, wait_until

PIDFD_GETFD = 438  # of every architecture
CUT_SECONDS = 60.0  # within which there is something to cut again
CONNECTED = "03"  # in /proc/net/unix


def cut(pid: int, name: str) -> int:
    """Shut down a process's connected sockets that are bound to a path with `name` in it; return how many.

    Those of a process that has ended are none.
    """
    inodes = {
        fields[6]
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]
        if len(fields := line.split()) == 8 and name in fields[7] and fields[5] == CONNECTED
    }
    try:
        return sum(_shut_down(pid, descriptor) for descriptor in _descriptors(pid, inodes))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def cut_at_rank_0(service: ServiceProcess, name: str) -> bool:
    """Return whether there was one to cut."""
    return any(cut(rank["pid"], name) == 1 for rank in ready_of(service)["ranks"][:1])


def _descriptors(pid: int, inodes: set[str]) -> Iterator[int]:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if str(entry.readlink()).removeprefix("socket:[").removesuffix("]") in inodes:
            yield int(entry.name)


def _shut_down(pid: int, descriptor: int) -> bool:
    pidfd = os.pidfd_open(pid)
    try:
        copy = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, pidfd, descriptor, 0)
        if copy < 0:
            pytest.skip(f"sockets of other processes cannot be had here: {os.strerror(ctypes.get_errno())}")
        with socket.socket(fileno=copy) as theirs:
            theirs.shutdown(socket.SHUT_RDWR)
    finally:
        os.close(pidfd)
    return True


@pytest.mark.parametrize("name", ["engine-", "steps-"])
def test_a_link_that_is_cut_is_a_pause(name: str) -> None:
    requests = bodies(8, 100)
    with ServiceProcess("-tp", "2", *EXACT, "--rank-timeout", str(RANK_TIMEOUT)) as service:
        expected = undisturbed(service, requests)
        with Crowd(service.url, requests) as crowd:
            for share in (1, 2, 3):
                crowd.wait_for_tokens(200 * share)
                # So many tokens may have come before the last cut: then its group is still the one that is shown.
                wait_until(lambda: cut_at_rank_0(service, name), CUT_SECONDS)
            streams = crowd.finish()
        check(streams, expected)
        if name == "engine-":  # of the other nothing is lost where no step was on its way: it is connected again
            assert service.metric("ryzanstein_recoveries_total") >= 1


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_disk(tmp_path / "disk", "4m") as disk:
        yield disk


def fill(disk: Path) -> None:
    with (disk / "filler").open("ab", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return


def test_a_rank_that_dies_while_the_disk_is_full_is_a_pause_or_one_clear_line(disk: Path) -> None:
    with ServiceProcess("-tp", "2", environment={"TMPDIR": str(disk)}) as service:
        service.complete(prompt="a", max_tokens=2)
        fill(disk)
        os.kill(service.rank_pids()[1], signal.SIGKILL)
        wait_until(lambda: service.process.poll() is not None or is_ready(service, 2), 60)
        if service.process.poll() is None:
            assert service.complete(prompt="a", max_tokens=2)
        else:
            assert service.process.returncode == 1
            assert "No space left on device" in service.stderr.splitlines()[-1]
            assert "Traceback" not in service.stderr


@contextmanager
def kept_full(disk: Path) -> Iterator[None]:
    """Take what room there is, and what becomes free."""
    over = threading.Event()

    def keep_full() -> None:
        while not over.wait(0.001):
            fill(disk)

    thread = threading.Thread(target=keep_full)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def with_shared_memory_of(size: str) -> tuple[str, ...]:
    """Return what starts a command, given after it, where /dev/shm is as small as `size`; skip where that cannot be."""
    mount = f'mount -t tmpfs -o size={size} none /dev/shm && exec "$@"'
    begin = ("unshare", "--mount", "sh", "-c", mount, "sh")
    tried = subprocess.run([*begin, "true"], check=False, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"mounts are not allowed here: {tried.stderr.strip()}")
    return begin


def test_a_rank_that_dies_while_shared_memory_is_full_is_a_pause() -> None:
    requests = bodies(8, 250)
    serve = (sys.executable, "-P", "-m", "server", "serve", "-tp", "2", *EXACT, "--port", "0")
    with ServiceProcess(command=[*with_shared_memory_of("8m"), *serve]) as service:
        expected = undisturbed(service, requests)
        disk = Path(f"/proc/{service.process.pid}/root/dev/shm")
        with Crowd(service.url, requests) as crowd, kept_full(disk):
            crowd.wait_for_tokens(200)
            kill_ranks_and_wait_until_full(service, disk)
            streams = crowd.finish()
            wait_until(lambda: is_ready(service, 2), 60)
        check(streams, expected)
        assert "the ranks use gloo, which is slower, since they cannot share memory" in service.stderr


def kill_ranks_and_wait_until_full(service: ServiceProcess, disk: Path) -> None:
    """Kill them so that their memory is taken before the next ranks want theirs."""
    ranks = [psutil.Process(pid) for pid in service.rank_pids()]
    with suspended(service.orchestrator()):  # for less than the time after which the server replaces it
        for rank in ranks:
            rank.kill()
        assert still_running(ranks, 5) == []
        wait_until(lambda: os.statvfs(disk).f_bavail == 0, 5)


def is_ready(service: ServiceProcess, epoch: int) -> bool:
    try:
        ready = ready_of(service)
    except httpx.HTTPError:
        return False
    return bool(ready["state"] == "READY" and ready["epoch"] >= epoch)
