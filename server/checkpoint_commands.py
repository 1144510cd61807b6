"""`ryzanstein checkpoint shard|inspect|verify|export`, as the command line has them."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from engine.protocol.commands import ExportCommand, InspectCommand, ShardCommand, VerifyCommand
from engine.protocol.logs import LogConfig
from engine.protocol.model_config import ModelConfig
from server.engine_command import EITHER_FORM, EngineCommand, Place, add_engine_commands
from server.logs import configure_logging
from server.model_source.config import ModelSourceConfig
from server.model_source.resolve import is_on_hub, resolve

PURPOSE = "split a checkpoint for ranks, look into it, verify it, or write it for other programs"
FROM_TO = {
    "source": Place("SRC", EITHER_FORM),
    "destination": Place("DST", "directory to write; it must not be there yet"),
}
ONE = {"path": Place("PATH", EITHER_FORM)}
WRITING_NOTE = """\
DST appears when it is whole: a run that fails or is interrupted leaves nothing.
Exit code: 0; 1 for what another try may cure, such as a hub or a disk that fails; 2 for a mistake of yours, a full
disk, or a checkpoint that cannot be read; 130 when interrupted.
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

COMMANDS = (
    EngineCommand(
        "shard",
        ShardCommand,
        "split a checkpoint for a number of ranks, in the form that they map into memory",
        HUB_NOTE + WRITING_NOTE,
        FROM_TO,
    ),
    EngineCommand("inspect", InspectCommand, "show what is in a checkpoint", INSPECT_NOTE, ONE),
    EngineCommand("verify", VerifyCommand, "check every file and every tensor of a checkpoint", VERIFY_NOTE, ONE),
    EngineCommand(
        "export",
        ExportCommand,
        "write a checkpoint as Hugging Face has it, for other programs",
        WRITING_NOTE,
        FROM_TO,
    ),
)

P = TypeVar("P", bound=argparse.ArgumentParser)


def add_checkpoint_commands(
    commands: "argparse._SubParsersAction[P]", formatter_class: type[argparse.HelpFormatter]
) -> None:
    """Add `checkpoint` to the command line, and its own commands to it."""
    add_engine_commands(commands, formatter_class, ("checkpoint", PURPOSE), COMMANDS, _with_model_here)


def _with_model_here(command: Any) -> object:
    """Return a command whose model is on this machine: one of the hub is downloaded."""
    if not isinstance(command, ShardCommand) or not is_on_hub(command.source):
        return command

    def check(directory: Path) -> None:
        ModelConfig.from_directory(directory).check_tensor_parallel_size(command.tensor_parallel_size)

    configure_logging(LogConfig())
    name = command.model_name or command.source
    return replace(command, source=str(resolve(command.source, ModelSourceConfig(), check)), model_name=name)
