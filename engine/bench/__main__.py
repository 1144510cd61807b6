"""`python -m engine.bench load JSON`: one command, as engine.protocol.commands tells it.

It runs in its caller's place. SIGINT or SIGTERM ends it and the ranks that it has started. Exit codes: 0; 2 for what a
user did, and for a checkpoint that cannot be loaded; 1 when a rank died; 130 when interrupted; 141 when what reads the
output wants no more.
"""

import io
import os
import sys

import msgspec

from engine.checkpoint.stop_request import EXIT_INTERRUPTED, Stopped, StopRequest
from engine.protocol.commands import BenchLoadCommand

EXIT_FAILED, EXIT_USER_ERROR, EXIT_UNREAD = 1, 2, 141
COMMANDS = {"load": BenchLoadCommand}


def main(arguments: list[str]) -> int:
    """Run one command and return the exit code."""
    stop = StopRequest()
    try:
        stop.listen()
        name, content = arguments
        _say(_run(msgspec.json.decode(content, type=COMMANDS[name]), stop))
        return 0
    except (ValueError, RuntimeError) as error:
        sys.stderr.write(f"ryzanstein: error: {' '.join(str(error).split())}\n")
        return EXIT_USER_ERROR if isinstance(error, ValueError) else EXIT_FAILED
    except Stopped:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_UNREAD
    finally:
        stop.end()


def _run(command: BenchLoadCommand, stop: StopRequest) -> str:
    # Importing torch takes a second, in which signals must be answered already.
    from engine.bench.load import measure_load  # noqa: PLC0415

    stop.unwind()
    benchmark = measure_load(command)
    return benchmark.to_json() if command.json else benchmark.to_table()


def _say(text: str) -> None:
    """Write to standard output, in whatever encoding it has.

    Raises:
        ValueError: if it takes nothing more.
        BrokenPipeError: if nobody reads it.
    """
    if not isinstance(sys.stdout, io.TextIOWrapper):
        raise ValueError("standard output is closed")
    sys.stdout.reconfigure(errors="replace")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)  # else Python would try again at its end, and complain
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        if isinstance(error, BrokenPipeError):
            raise
        raise ValueError(f"standard output: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
