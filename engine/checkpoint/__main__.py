"""`python -m engine.checkpoint shard|inspect|verify|export JSON`: one command, as engine.protocol.commands tells it.

It runs in its caller's place on a terminal, or in the background. SIGINT or SIGTERM ends it with nothing half written;
with `PARENT_PID_VARIABLE` in its environment it also dies with the process of that id. Exit codes: 0; 2 for what a user
did, and for a checkpoint that is not in order; 130 when interrupted; 141 when what reads the output wants no more.
"""

import logging
import sys
from typing import Any

from engine.command.main import run_command
from engine.command.stop_request import StopRequest
from engine.protocol.commands import ExportCommand, InspectCommand, ShardCommand, VerifyCommand
from engine.worker.parent import die_with_parent

COMMANDS: dict[str, type] = {
    "shard": ShardCommand,
    "inspect": InspectCommand,
    "verify": VerifyCommand,
    "export": ExportCommand,
}


def _run(command: Any, stop: StopRequest) -> int:
    die_with_parent()
    logging.basicConfig(format="%(levelname)s %(message)s")
    logging.getLogger("engine").setLevel(logging.INFO)
    # Importing torch takes a second, in which signals must be answered already.
    from engine.checkpoint.run import run  # noqa: PLC0415

    stop.unwind()
    return run(command, stop)


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], COMMANDS, _run))
