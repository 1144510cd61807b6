"""`python -m engine.bench load|limits|decode|collectives JSON`: one command, as engine.protocol.commands tells it.

It runs in its caller's place. SIGINT or SIGTERM ends it and the ranks that it has started. Exit codes: 0; 2 for what a
user did, and for a checkpoint that cannot be loaded; 1 when a rank died; 130 when interrupted; 141 when what reads the
output wants no more.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from engine.command.main import run_command
from engine.command.output import complain, say
from engine.command.stop_request import StopRequest
from engine.protocol.commands import BenchCollectivesCommand, BenchDecodeCommand, BenchLimitsCommand, BenchLoadCommand
from engine.protocol.errors import EXIT_FAILED

EXIT_OK = 0


class _Bench(NamedTuple):
    """One command: what it is told, and the function that measures and returns a report."""

    command: type
    module: str
    function: str


BENCHES = {
    "load": _Bench(BenchLoadCommand, "engine.bench.load", "measure_load"),
    "limits": _Bench(BenchLimitsCommand, "engine.bench.limits", "measure_limits"),
    "decode": _Bench(BenchDecodeCommand, "engine.bench.decode", "measure_decode"),
    "collectives": _Bench(BenchCollectivesCommand, "engine.bench.collectives", "measure_collectives"),
}


def _run(command: Any, stop: StopRequest) -> int:
    bench = next(item for item in BENCHES.values() if item.command is type(command))
    # Importing torch takes a second, in which signals must be answered already.
    measure: Callable[[Any], Any] = getattr(import_module(bench.module), bench.function)
    stop.unwind()
    try:
        report = measure(command)
    except RuntimeError as error:
        complain(error)
        return EXIT_FAILED
    say(report.to_json() if command.json else report.to_table())
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], {name: item.command for name, item in BENCHES.items()}, _run))
