"""A service that a benchmark starts and asks over HTTP."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SERVE = (str(Path(sys.executable).with_name("ryzanstein")), "serve")
START_SECONDS, END_SECONDS = 300.0, 30.0


@contextmanager
def running_service(arguments: Sequence[str]) -> Iterator[str]:
    """Run `ryzanstein serve` with these arguments, on a free port, and yield its address once it is ready.

    Raises:
        RuntimeError: if it does not start, with what it said.
    """
    process = subprocess.Popen([*SERVE, *arguments, "--port", "0"], stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(START_SECONDS, process.kill)
    watchdog.start()
    assert process.stderr is not None
    try:
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"https?://[\d.]+:\d+", line):
                watchdog.cancel()
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield found[0]
                return
        raise RuntimeError(f"the service did not start:\n{''.join(lines)}")
    finally:
        watchdog.cancel()
        process.terminate()
        process.wait(END_SECONDS)
