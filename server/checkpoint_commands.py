"""`ryzanstein checkpoint shard|inspect|verify|export`: told here, done by a process of the engine in this one's place.

What is written to a disk follows from the command line alone: no variable, and no file, has a say.
"""

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from engine.protocol.commands import ExportCommand, InspectCommand, ShardCommand, VerifyCommand
from engine.protocol.model_config import ModelConfig
from server.engine_command import become
from server.logs import configure_logging
from server.model_source.config import ModelSourceConfig
from server.model_source.resolve import is_on_hub, resolve
from server.options import Option, add_options, build, from_command_line, options_of
from server.signals import StopRequested

EXIT_INTERRUPTED = 130  # as shells have it for SIGINT: what was asked for was not done
SOURCE = "directory of a checkpoint of either form, or of one for each step (the latest is taken)"
PLACES = {"source": "SRC", "destination": "DST", "path": "PATH"}
PLACE_HELP = {"source": SOURCE, "destination": "directory to write; it must not be there yet", "path": SOURCE}
PURPOSE = "split a checkpoint for ranks, look into it, verify it, or write it for other programs"
WRITING_NOTE = """\
DST appears when it is whole: a run that fails or is interrupted leaves nothing.
Exit code: 0; 2 for a mistake of yours, or a checkpoint that cannot be read; 130 when interrupted.
"""
HUB_NOTE = """\
SRC may also be a name on the hub, such as org/name, for which the hub's own variables hold (HF_TOKEN, HF_HOME,
HF_HUB_OFFLINE).
"""
INSPECT_NOTE = """\
Exit code: 0; 2 for a mistake of yours, or a checkpoint that cannot be read; 130 when interrupted; 141 when what reads
the output wants no more.
"""
VERIFY_NOTE = """\
Exit code: 0 where nothing is wrong; 2 where something is, or for a mistake of yours; 130 when interrupted; 141 when
what reads the output wants no more.
"""

P = TypeVar("P", bound=argparse.ArgumentParser)


@dataclass(frozen=True)
class _Command:
    """One word behind `ryzanstein checkpoint`."""

    name: str
    config: type
    purpose: str
    note: str

    @property
    def places(self) -> list[str]:
        """The fields that stand on the command line without a flag, in order."""
        return [option.name for option in options_of(self.config) if option.name in PLACES]

    @property
    def options(self) -> list[Option]:
        """The others."""
        return [option for option in options_of(self.config) if option.name not in PLACES]


COMMANDS = (
    _Command(
        "shard",
        ShardCommand,
        "split a checkpoint for a number of ranks, in the form that they map into memory",
        HUB_NOTE + WRITING_NOTE,
    ),
    _Command("inspect", InspectCommand, "show what is in a checkpoint", INSPECT_NOTE),
    _Command("verify", VerifyCommand, "check every file and every tensor of a checkpoint", VERIFY_NOTE),
    _Command("export", ExportCommand, "write a checkpoint as Hugging Face has it, for other programs", WRITING_NOTE),
)


def add_checkpoint_commands(
    commands: "argparse._SubParsersAction[P]", formatter_class: type[argparse.HelpFormatter]
) -> None:
    """Add `checkpoint` to the command line, and its own commands to it."""
    parser = commands.add_parser(
        "checkpoint",
        help=PURPOSE,
        description=f"{PURPOSE[0].upper()}{PURPOSE[1:]}.",
        formatter_class=formatter_class,
        allow_abbrev=False,
    )
    parser.set_defaults(command=parser)
    own_commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        words = " ".join(PLACES[name] for name in command.places)
        own = own_commands.add_parser(
            command.name,
            help=command.purpose,
            description=f"{command.purpose[0].upper()}{command.purpose[1:]}.",
            epilog=command.note,
            formatter_class=formatter_class,
            usage=f"ryzanstein checkpoint {command.name} {words} [options]",
            allow_abbrev=False,
        )
        for name in command.places:
            own.add_argument(name, metavar=PLACES[name], help=PLACE_HELP[name])
        add_options(own, "what and how", command.options, have_variables=False)
        own.set_defaults(run=partial(_run, command), command=own)


def _run(command: _Command, namespace: argparse.Namespace) -> int:
    """Check what can be checked here, and become the process that does it."""
    try:
        become("engine.checkpoint", command.name, _read(command, namespace))
    except StopRequested:
        return EXIT_INTERRUPTED


def _read(command: _Command, namespace: argparse.Namespace) -> object:
    """Return the command as the engine takes it; a model of the hub is on this machine then."""
    places = {name: getattr(namespace, name) for name in command.places}
    config: Any = build(
        partial(command.config, **places), command.options, from_command_line(namespace, command.options)
    )
    if isinstance(config, ShardCommand) and is_on_hub(config.source):
        return _downloaded(config)
    return config


def _downloaded(command: ShardCommand) -> ShardCommand:
    def check(directory: Path) -> None:
        ModelConfig.from_directory(directory).check_tensor_parallel_size(command.tensor_parallel_size)

    configure_logging("info")
    name = command.model_name or command.source
    return replace(command, source=str(resolve(command.source, ModelSourceConfig(), check)), model_name=name)
