"""What every Prometheus client tells of its process, here that of the server: the ranks tell of themselves."""

import contextlib
import errno
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

from server.metrics.series import Family, Value

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def watch_process(add: Callable[[str], Family[Value]]) -> None:
    """Have the metrics that `add` makes, by name, show this process."""
    add("process_cpu_seconds_total").labels().set_function(time.process_time)
    add("process_resident_memory_bytes").labels().set_function(_or_last(_resident_bytes))
    add("process_open_fds").labels().set_function(_or_last(_num_open_files))
    add("process_max_fds").labels().set_function(_most_open_files)
    add("process_start_time_seconds").labels().set(_start_time())


def _or_last(read: Callable[[], float]) -> Callable[[], float]:
    """Return what reads as `read` does, and while no file can be opened, repeats what was read last."""
    last = read()

    def read_or_repeat() -> float:
        nonlocal last
        with contextlib.suppress(OSError):
            last = read()
        return last

    return read_or_repeat


def _resident_bytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def _num_open_files() -> float:
    try:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # names alone, without an object for each
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        return _most_open_files()


def _most_open_files() -> float:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _start_time() -> float:
    """Return when this process began, in seconds since the epoch of the calendar (proc(5): starttime is the 22nd)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / TICKS_PER_SECOND
