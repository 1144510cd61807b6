"""Which directory holds a model, and what it says the model is: a Hugging Face or a distributed checkpoint.

model/                         checkpoints/
    config.json                    model-step-900/
    tokenizer.json                 model-step-1000/
    model.safetensors                  metadata.json             its "config" is what config.json holds
                                       tokenizer.json
                                       weights_rank0.safetensors …
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.protocol.errors import file_error

CONFIG_FILE = "config.json"
METADATA_FILE = "metadata.json"
STEP_DIRECTORY = re.compile(r"model-step-(\d+)")


def step_directory(parent: Path, step: int) -> Path:
    """Return where `parent` keeps the checkpoint of a step."""
    return parent / f"model-step-{step}"


@contextlib.contextmanager
def looked_into(path: str | Path) -> Iterator[None]:
    """Raise ValueError, naming what cannot be looked into, where the block would raise OSError."""
    try:
        yield
    except OSError as error:
        raise file_error(f"model: {error.filename or path} cannot be looked into: {error.strerror}", error) from error


def is_directory(path: str | Path) -> bool:
    """Whether a path is a directory's.

    Raises:
        ValueError: if this process may not know.
    """
    with looked_into(path):
        return Path(path).is_dir()


def steps_in(parent: Path) -> list[int]:
    """Return the steps that `parent` holds whole checkpoints of, in rising order."""
    found = (STEP_DIRECTORY.fullmatch(path.name) for path in parent.iterdir())
    steps = sorted(int(match[1]) for match in found if match)
    return [step for step in steps if is_distributed(step_directory(parent, step))]


def is_distributed(directory: Path) -> bool:
    """Whether a directory holds a distributed checkpoint. Others have files of that name too, beside a config.json."""
    return (directory / METADATA_FILE).is_file() and not (directory / CONFIG_FILE).is_file()


def find_model_directory(path: str | Path, step: int | None = None) -> Path:
    """Return the model's directory: `path` itself, or of a directory with a checkpoint for each step the latest.

    Args:
        path: a model's directory, or the parent of `model-step-N` directories.
        step: which of these, if not the latest.

    Raises:
        ValueError: naming the directory, if it holds no such thing, or cannot be looked into.
    """
    with looked_into(path):
        return _find_model_directory(Path(path), step)


def _find_model_directory(directory: Path, step: int | None) -> Path:
    if not directory.is_dir():
        raise ValueError(f"model: {directory} is not a directory")
    if step is None and (is_distributed(directory) or (directory / CONFIG_FILE).is_file()):
        return directory
    steps = steps_in(directory)
    if step is not None and step not in steps:
        raise ValueError(f"model: {directory} has no checkpoint of step {step}; {_listed(steps)}")
    if not steps:
        raise ValueError(
            f"model: {directory} has neither {CONFIG_FILE} nor {METADATA_FILE}, nor any model-step-N in it"
        )
    return step_directory(directory, steps[-1] if step is None else step)


def read_model_config(directory: Path) -> tuple[dict[str, Any], str]:
    """Return the model's configuration, as `config.json` has it, and the name of where it stands, for errors.

    Raises:
        ValueError: naming the file that is missing or cannot be read.
    """
    with looked_into(directory):
        return _read_model_config(directory)


def _read_model_config(directory: Path) -> tuple[dict[str, Any], str]:
    if not directory.is_dir():
        raise ValueError(f"model: {directory} is not a directory")
    if not is_distributed(directory):
        path = directory / CONFIG_FILE
        if not path.is_file():
            raise ValueError(f"model: {directory} has no {CONFIG_FILE}; is it a Hugging Face model directory?")
        return read_object(path), str(path)
    path = directory / METADATA_FILE
    config = read_object(path).get("config")
    if not isinstance(config, dict):
        raise ValueError(f"{path}: config must be an object, as in {CONFIG_FILE}")
    return config, f"{path}: config"


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        ValueError: naming the file that holds none, or cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise file_error(f"{path}: cannot be read as JSON: {error}", error) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return content


def _listed(steps: list[int]) -> str:
    return f"it has {', '.join(map(str, steps))}" if steps else "it has none of any step"
