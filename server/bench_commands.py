"""`ryzanstein bench load`, as the command line has it."""

import argparse
from typing import TypeVar

from engine.protocol.commands import BenchLoadCommand
from server.engine_command import EITHER_FORM, EngineCommand, Place, add_engine_commands

LOAD_NOTE = """\
Every run has fresh processes on the CPU, one thread each, which begin at once. For the cold runs the files are dropped
from the page cache, which is everyone's: what else reads them will read the disk once more.
Exit code: 0; 1 when a rank died; 2 for a mistake of yours, or a checkpoint that cannot be loaded so; 130 when
interrupted; 141 when what reads the output wants no more.
"""
COMMANDS = (
    EngineCommand(
        "load",
        BenchLoadCommand,
        "measure how long loading a checkpoint takes, beside a plain map of the same bytes",
        LOAD_NOTE,
        {"model": Place("MODEL", EITHER_FORM)},
    ),
)

P = TypeVar("P", bound=argparse.ArgumentParser)


def add_bench_commands(
    commands: "argparse._SubParsersAction[P]", formatter_class: type[argparse.HelpFormatter]
) -> None:
    """Add `bench` to the command line, and its own commands to it."""
    add_engine_commands(commands, formatter_class, ("bench", "measure this machine with a model"), COMMANDS)
