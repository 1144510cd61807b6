"""`ryzanstein bench load`: told here, done by a process of the engine in this one's place."""

import argparse
from functools import partial
from typing import TypeVar

from engine.protocol.commands import BenchLoadCommand
from server.engine_command import become
from server.options import Option, add_options, build, from_command_line, options_of
from server.signals import StopRequested

EXIT_INTERRUPTED = 130  # as shells have it for SIGINT: what was asked for was not done
PURPOSE = "measure this machine with a model"
LOAD_PURPOSE = "measure how long loading a checkpoint takes, beside a plain map of the same bytes"
MODEL_HELP = "directory of a checkpoint of either form, or of one for each step (the latest is taken)"
LOAD_NOTE = """\
Every run has fresh processes on the CPU, one thread each, which begin at once. For the cold runs the files are dropped
from the page cache, which is everyone's: what else reads them will read the disk once more.
Exit code: 0; 1 when a rank died; 2 for a mistake of yours, or a checkpoint that cannot be loaded so; 130 when
interrupted; 141 when what reads the output wants no more.
"""

P = TypeVar("P", bound=argparse.ArgumentParser)


def add_bench_commands(
    commands: "argparse._SubParsersAction[P]", formatter_class: type[argparse.HelpFormatter]
) -> None:
    """Add `bench` to the command line, and its own commands to it."""
    parser = commands.add_parser(
        "bench",
        help=PURPOSE,
        description=f"{PURPOSE[0].upper()}{PURPOSE[1:]}.",
        formatter_class=formatter_class,
        allow_abbrev=False,
    )
    parser.set_defaults(command=parser)
    own_commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    load = own_commands.add_parser(
        "load",
        help=LOAD_PURPOSE,
        description=f"{LOAD_PURPOSE[0].upper()}{LOAD_PURPOSE[1:]}.",
        epilog=LOAD_NOTE,
        formatter_class=formatter_class,
        usage="ryzanstein bench load MODEL [options]",
        allow_abbrev=False,
    )
    _, *options = options_of(BenchLoadCommand)
    load.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_options(load, "what and how", options, have_variables=False)
    load.set_defaults(run=partial(_load, options), command=load)


def _load(options: list[Option], namespace: argparse.Namespace) -> int:
    """Check the command line, and become the process that measures."""
    try:
        make = partial(BenchLoadCommand, model=namespace.model)
        become("engine.bench", "load", build(make, options, from_command_line(namespace, options)))
    except StopRequested:
        return EXIT_INTERRUPTED
