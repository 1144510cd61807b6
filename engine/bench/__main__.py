"""`python -m engine.bench load JSON`: one command, as engine.protocol.commands tells it.

It runs in its caller's place. SIGINT or SIGTERM ends it and the ranks that it has started. Exit codes: 0; 2 for what a
user did, and for a checkpoint that cannot be loaded; 1 when a rank died; 130 when interrupted; 141 when what reads the
output wants no more.
"""

import sys

from engine.command.main import run_command
from engine.command.output import complain, say
from engine.command.stop_request import StopRequest
from engine.protocol.commands import BenchLoadCommand

EXIT_OK, EXIT_FAILED = 0, 1


def _load(command: BenchLoadCommand, stop: StopRequest) -> int:
    # Importing torch takes a second, in which signals must be answered already.
    from engine.bench.load import measure_load  # noqa: PLC0415

    stop.unwind()
    try:
        benchmark = measure_load(command)
    except RuntimeError as error:
        complain(error)
        return EXIT_FAILED
    say(benchmark.to_json() if command.json else benchmark.to_table())
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], {"load": BenchLoadCommand}, _load))
