"""`ryzanstein bench …`, as the command line has it."""

import argparse
from typing import TypeVar

from engine.protocol.commands import BenchCollectivesCommand, BenchDecodeCommand, BenchLimitsCommand, BenchLoadCommand
from server.engine_command import EITHER_FORM, EngineCommand, Place, add_engine_commands

LOAD_NOTE = """\
Every run has fresh processes on the CPU, one thread each, which begin at once. For the cold runs the files are dropped
from the page cache, which is everyone's: what else reads them will read the disk once more.
Exit code: 0; 1 when a rank died; 2 for a mistake of yours, or a checkpoint that cannot be loaded so; 130 when
interrupted; 141 when what reads the output wants no more.
"""
LIMITS_NOTE = """\
Each figure is the best of the ways that are known: a C++ loop that reads 1 GiB or more, torch's products and our own.
What else runs at the same time takes its part.
Exit code: 0; 2 for a mistake of yours; 130 when interrupted; 141 when what reads the output wants no more.
"""
DECODE_NOTE = """\
The engine is started as serve starts it, and asked over its sockets. Prompts of random tokens are computed once; each
turn finds them in the KV cache and decodes from there. The limits are measured before and after each turn.
Exit code: 0; 1 when the engine failed; 2 for a mistake of yours, or a model that cannot be run so; 130 when
interrupted; 141 when what reads the output wants no more.
"""
COLLECTIVES_NOTE = """\
Ranks are fresh processes on the CPU, one thread each. They use shared memory and gloo in turns; beside that stands a
plain copy of as many bytes by all of them at once.
Exit code: 0; 1 when a rank died; 2 for a mistake of yours; 130 when interrupted; 141 when what reads the output wants
no more.
"""
COMMANDS = (
    EngineCommand(
        "load",
        BenchLoadCommand,
        "measure how long loading a checkpoint takes, beside a plain map of the same bytes",
        LOAD_NOTE,
        {"model": Place("MODEL", EITHER_FORM)},
    ),
    EngineCommand(
        "limits",
        BenchLimitsCommand,
        "measure what this machine allows: reading memory and multiplying matrices, by cores",
        LIMITS_NOTE,
        {},
    ),
    EngineCommand(
        "decode",
        BenchDecodeCommand,
        "measure decode and prefill steps of a real engine, beside what the machine allows",
        DECODE_NOTE,
        {"model": Place("MODEL", EITHER_FORM)},
    ),
    EngineCommand(
        "collectives",
        BenchCollectivesCommand,
        "measure what it takes ranks of this machine to exchange data, over shared memory and over gloo",
        COLLECTIVES_NOTE,
        {},
    ),
)

P = TypeVar("P", bound=argparse.ArgumentParser)


def add_bench_commands(
    commands: "argparse._SubParsersAction[P]", formatter_class: type[argparse.HelpFormatter]
) -> None:
    """Add `bench` to the command line, and its own commands to it."""
    add_engine_commands(commands, formatter_class, ("bench", "measure this machine, alone and with a model"), COMMANDS)
