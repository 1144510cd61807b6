"""How long a start takes: from the process's start to the first token over HTTP, beside `python -c "import torch"`.

    .venv/bin/python benchmarks/startup.py --runs 9 --tensor-parallel-size 1 2 --json startup.json

A round starts each of them once, in turns, so that a slow moment of the machine meets all. Before the first round each
runs once without being counted, which fills the page cache. The request is sent as soon as the service says where it
listens, which it does when it is ready. Times are medians. Options that are not known here are the service's, and so is
a model; without one the embedded model is served.
"""

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from arguments import count

BODY = {"prompt": "def ", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "stream": True}
IMPORT_TORCH = (sys.executable, "-c", "import torch")
SERVE = (str(Path(sys.executable).with_name("ryzanstein")), "serve")
START_SECONDS, END_SECONDS = 300.0, 30.0


def time_import() -> dict[str, float]:
    """Return the seconds that importing torch takes, from the process's start to its end."""
    started = time.perf_counter()
    subprocess.run(IMPORT_TORCH, check=True)
    return {"import torch": time.perf_counter() - started}


def time_service(name: str, arguments: list[str]) -> dict[str, float]:
    """Return the seconds from the process's start until it is ready, and until the first token has come over HTTP."""
    started = time.perf_counter()
    process = subprocess.Popen([*SERVE, *arguments, "--port", "0"], stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(START_SECONDS, process.kill)
    watchdog.start()
    assert process.stderr is not None
    try:
        url = _listening_url(process.stderr)
        ready = time.perf_counter()
        _await_first_token(url)
        first_token = time.perf_counter()
    finally:
        watchdog.cancel()
        process.terminate()
        process.stderr.read()
        process.wait(END_SECONDS)
    return {f"{name}: ready": ready - started, f"{name}: first token": first_token - started}


def _listening_url(stderr: IO[str]) -> str:
    lines = []
    for line in stderr:
        lines.append(line)
        if found := re.search(r"https?://[\d.]+:\d+", line):
            return found[0]
    raise RuntimeError(f"the service did not start:\n{''.join(lines)}")


def _await_first_token(url: str) -> None:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=START_SECONDS)
    connection.request("POST", "/v1/completions", json.dumps(BODY), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {response.read().decode()}")
    while line := response.readline():
        if line.startswith(b"data: {") and json.loads(line[len(b"data: ") :])["choices"][0]["text"]:
            connection.close()
            return
    raise RuntimeError("the stream ended without a token")


def measure(sizes: list[int], arguments: list[str], runs: int) -> dict[str, list[float]]:
    """Return the seconds of each run by what was timed."""
    times: dict[str, list[float]] = {}
    for run in range(-1, runs):
        timed = time_import()
        for size in sizes:
            timed |= time_service(f"tp {size}", [*arguments, "--tensor-parallel-size", str(size)])
        if run >= 0:
            for name, seconds in timed.items():
                times.setdefault(name, []).append(seconds)
    return times


def summarise(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return median, fastest and slowest by what was timed, and how many times the import's median the median is."""
    unit = statistics.median(times["import torch"])
    return {
        name: {
            "median_seconds": round(statistics.median(seconds), 4),
            "min_seconds": round(min(seconds), 4),
            "max_seconds": round(max(seconds), 4),
            "ratio": round(statistics.median(seconds) / unit, 3),
        }
        for name, seconds in times.items()
    }


def table(summary: dict[str, dict[str, float]]) -> str:
    """Return the summary as people read it."""
    lines = [f"{'':<20}{'median':>9}{'fastest':>9}{'slowest':>9}   of import torch"]
    for name, row in summary.items():
        seconds = "".join(f"{row[key]:>8.2f}s" for key in ("median_seconds", "min_seconds", "max_seconds"))
        lines.append(f"{name:<20}{seconds}{row['ratio']:>11.2f}x")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--runs", type=count, default=9, help="rounds that count (9)")
    parser.add_argument("--tensor-parallel-size", "-tp", type=count, nargs="+", default=[1, 2], help="ranks (1 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times there, too")
    namespace, arguments = parser.parse_known_args()  # what is unknown is the service's: a model, other options
    try:
        times = measure(namespace.tensor_parallel_size, arguments, namespace.runs)
    except (OSError, RuntimeError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    summary = summarise(times)
    sys.stdout.write(table(summary))
    if namespace.json is not None:
        document: dict[str, Any] = {"cores": os.cpu_count(), "summary": summary, "seconds": times}
        namespace.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
