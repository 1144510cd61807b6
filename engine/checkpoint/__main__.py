"""`python -m engine.checkpoint shard|inspect|verify|export JSON`: one command, as engine.protocol.commands tells it.

It runs in its caller's place on a terminal, or in the background. SIGINT or SIGTERM ends it with nothing half written;
with `PARENT_PID_VARIABLE` in its environment it also dies with the process of that id. Exit codes: 0; 2 for what a user
did, and for a checkpoint that is not in order; 130 when interrupted; 141 when what reads the output wants no more.
"""

import logging
import os
import sys
from typing import Any

import msgspec

from engine.checkpoint.stop_request import EXIT_INTERRUPTED, Stopped, StopRequest
from engine.protocol.commands import ExportCommand, InspectCommand, ShardCommand, VerifyCommand
from engine.worker.parent import die_with_parent

EXIT_USER_ERROR, EXIT_UNREAD = 2, 141
COMMANDS: dict[str, type] = {
    "shard": ShardCommand,
    "inspect": InspectCommand,
    "verify": VerifyCommand,
    "export": ExportCommand,
}


def main(arguments: list[str]) -> int:
    """Run one command and return the exit code."""
    stop = StopRequest()
    try:
        stop.listen()
        die_with_parent()
        logging.basicConfig(format="%(levelname)s %(message)s")
        logging.getLogger("engine").setLevel(logging.INFO)
        name, content = arguments
        return _run(msgspec.json.decode(content, type=COMMANDS[name]), stop)
    except ValueError as error:
        sys.stderr.write(f"ryzanstein: error: {' '.join(str(error).split())}\n")
        return EXIT_USER_ERROR
    except Stopped:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _give_up_standard_output()
        return EXIT_UNREAD
    finally:
        stop.end()


def _run(command: Any, stop: StopRequest) -> int:
    # Importing torch takes a second, in which signals must be answered already.
    from engine.checkpoint.run import run  # noqa: PLC0415

    stop.unwind()
    return run(command, stop)


def _give_up_standard_output() -> None:
    """Send what could not be written nowhere; Python would try again at its end, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
