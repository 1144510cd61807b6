"""From the text that names the model to the directory that holds it: the one place where that is decided."""

from collections.abc import Callable
from pathlib import Path

from engine.protocol.model_directory import find_model_directory, is_directory, looked_into, steps_in
from server.model_source import hub
from server.model_source.config import ModelSourceConfig, is_hub_name


def is_on_hub(model: str) -> bool:
    """Whether `model` is to be taken from the hub: it is written like a name there, and no directory has that name.

    Raises:
        ValueError: if this process may not know whether one has.
    """
    return is_hub_name(model) and not is_directory(model)


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
        ValueError: if there is none, it cannot be looked into, or an option speaks of the hub.
    """
    directory = Path(model)
    if not is_directory(directory):
        raise ValueError(f"model: {model} is not a directory, nor a name on the hub such as org/name")
    if config.revision is not None:
        raise ValueError(f"--revision is for models of the hub, and {model} is a directory")
    with looked_into(directory):
        return find_model_directory(directory) if steps_in(directory) else directory
