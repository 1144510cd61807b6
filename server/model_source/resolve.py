"""From the text that names the model to the directory that holds it: the one place where that is decided."""

from collections.abc import Callable
from pathlib import Path

from engine.protocol.model_directory import find_model_directory, steps_in
from server.model_source import hub
from server.model_source.config import ModelSourceConfig, is_hub_name


def is_on_hub(model: str) -> bool:
    """Whether `model` is to be taken from the hub: it is written like a name there, and no directory has that name."""
    return not Path(model).is_dir() and is_hub_name(model)


def resolve(model: str, config: ModelSourceConfig, check: Callable[[Path], object]) -> Path:
    """Return the model's directory, once everything is there that it takes.

    Args:
        model: a directory, the parent of one for each step, or a name on the hub.
        config: where models come from.
        check: gets the directory before its weights are downloaded, and raises ValueError if it cannot be served.

    Raises:
        ValueError: in one line, why there is no such directory.
    """
    if is_on_hub(model):
        return hub.download(model, config, check)
    directory = find_local(model, config)
    check(directory)
    return directory


def find_local(model: str, config: ModelSourceConfig) -> Path:
    """Return the directory that `model` means on this machine.

    Raises:
        ValueError: if there is none, or an option speaks of the hub.
    """
    directory = Path(model)
    if not directory.is_dir():
        raise ValueError(f"model: {model} is not a directory, nor a name on the hub such as org/name")
    if config.revision is not None:
        raise ValueError(f"--revision is for models of the hub, and {model} is a directory")
    return find_model_directory(directory) if steps_in(directory) else directory
