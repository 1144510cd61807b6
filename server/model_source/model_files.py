"""Which files a model consists of: the small ones, and the weights that these name. Nothing else is ever downloaded."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from engine.protocol.model_directory import CONFIG_FILE, METADATA_FILE, is_distributed, read_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TEXT_FILES = ("generation_config.json", "tokenizer*.json", "*.jinja")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def small_files(names: Iterable[str]) -> list[str]:
    """Return which of a repository's files tell what the model is, and how it reads text.

    Raises:
        ValueError: if they are none of a model that can be served.
    """
    there = sorted(names)
    texts = [name for name in there if "/" not in name and any(fnmatchcase(name, pattern) for pattern in TEXT_FILES)]
    if CONFIG_FILE in there:
        listing = [name for name in (SINGLE_FILE, INDEX_FILE) if name in there][:1]
        if not listing:
            raise ValueError(_no_weights(there))
        return [CONFIG_FILE, *texts, *(name for name in listing if name == INDEX_FILE)]
    if METADATA_FILE in there:
        return [METADATA_FILE, *texts]
    raise ValueError(f"it has neither {CONFIG_FILE} nor {METADATA_FILE}")


def _no_weights(names: list[str]) -> str:
    pickles = [name for name in names if any(fnmatchcase(name, pattern) for pattern in PICKLES)]
    besides = f"; {pickles[0]} can run code when it is read, and never is" if pickles else ""
    return f"it has neither {SINGLE_FILE} nor {INDEX_FILE}{besides}"


def weight_files(directory: Path) -> list[str]:
    """Return the names of the weight files that the small files in `directory` name, whether they are there or not.

    Raises:
        ValueError: naming the file that cannot be read, or that names a file outside of the directory.
    """
    if is_distributed(directory):
        path = directory / METADATA_FILE
        files = read_object(path).get("files")
        return _plain_names(path, [file.get("name") for file in files or () if isinstance(file, dict)])
    if (directory / INDEX_FILE).is_file() and not (directory / SINGLE_FILE).is_file():
        path = directory / INDEX_FILE
        weight_map = read_object(path).get("weight_map")
        return _plain_names(path, list(weight_map.values()) if isinstance(weight_map, dict) else [])
    return [SINGLE_FILE]


def is_whole(directory: Path) -> bool:
    """Whether everything that serving the model in `directory` takes is there."""
    has_texts = any((directory / name).is_file() for name in (CONFIG_FILE, METADATA_FILE))
    return has_texts and all((directory / name).is_file() for name in weight_files(directory))


def _plain_names(path: Path, names: list[Any]) -> list[str]:
    """Return each of `names` once, if each is a file's in the directory of `path`."""
    if not names:
        raise ValueError(f"{path}: names no weight files")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{path}: must name files of the same directory, not {name!r}")
    return sorted(set(names))
