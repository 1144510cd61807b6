"""Commands that a process of the engine does in this one's place: told on the command line here, and handed over."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeVar

import msgspec

from server.environment import engine_environment
from server.options import Option, add_options, build, from_command_line, options_of
from server.signals import STOP_SIGNALS

EITHER_FORM = "directory of a checkpoint of either form, or of one for each step (the latest is taken)"

P = TypeVar("P", bound=argparse.ArgumentParser)


class Place(NamedTuple):
    """A field that stands on the command line without a flag."""

    metavar: str
    help: str


@dataclass(frozen=True)
class EngineCommand:
    """One command: what it is told is a dataclass of engine.protocol.commands."""

    name: str
    config: type
    purpose: str
    note: str
    places: Mapping[str, Place]  # by the field's name

    @property
    def options(self) -> list[Option]:
        """The fields with a flag. No variable, and no file, has a say in them."""
        return [option for option in options_of(self.config) if option.name not in self.places]


def add_engine_commands(
    commands: "argparse._SubParsersAction[P]",
    formatter_class: type[argparse.HelpFormatter],
    group: tuple[str, str],
    own: Sequence[EngineCommand],
    prepare: Callable[[Any], object] = lambda config: config,
) -> None:
    """Add a word with commands of its own to the command line.

    Args:
        commands: of the command line.
        formatter_class: of its help texts.
        group: the word, of which `engine` has a package, and what it is for.
        own: its commands.
        prepare: gets what a command is told, and returns what the engine is.
    """
    word, purpose = group
    parser = commands.add_parser(
        word, help=purpose, description=_sentence(purpose), formatter_class=formatter_class, allow_abbrev=False
    )
    parser.set_defaults(command=parser)
    own_commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in own:
        words = "".join(f"{place.metavar} " for place in command.places.values())
        own_parser = own_commands.add_parser(
            command.name,
            help=command.purpose,
            description=_sentence(command.purpose),
            epilog=command.note,
            formatter_class=formatter_class,
            usage=f"ryzanstein {word} {command.name} {words}[options]",
            allow_abbrev=False,
        )
        for name, place in command.places.items():
            own_parser.add_argument(name, metavar=place.metavar, help=place.help)
        add_options(own_parser, "what and how", command.options, have_variables=False)
        own_parser.set_defaults(run=partial(_run, f"engine.{word}", command, prepare), command=own_parser)


def _sentence(purpose: str) -> str:
    return f"{purpose[0].upper()}{purpose[1:]}."


def _run(
    module: str, command: EngineCommand, prepare: Callable[[Any], object], namespace: argparse.Namespace
) -> NoReturn:
    """Check what can be checked here, and become the process that does it."""
    places = {name: getattr(namespace, name) for name in command.places}
    make = partial(command.config, **places)
    config = build(make, command.options, from_command_line(namespace, command.options))
    become(module, command.name, prepare(config))


def become(module: str, name: str, command: object) -> NoReturn:
    """Become `python -m module name command`, which takes this process's id, terminal and signals.

    So nothing needs to be passed on, and nothing can be left behind.

    Args:
        module: of the engine.
        name: of the command.
        command: what engine.protocol.commands says of it.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None: its descriptor is closed
            stream.flush()
    # Signals that come from here on wait for the other program, which lets them in when it can answer them.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    content = msgspec.json.encode(command).decode()
    arguments = [sys.executable, "-P", "-m", module, name, content]
    os.execve(sys.executable, arguments, engine_environment())
