"""Where a conversion writes to: a directory that is not there yet, on a disk with room."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from engine.checkpoint.atomic import NewDirectory, unwritable
from engine.checkpoint.retry import read_bytes
from engine.protocol.units import format_bytes

# What belongs to a model beside its configuration and its weights.
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


@contextlib.contextmanager
def new_checkpoint(destination: Path, source: Path, num_bytes: int) -> Iterator[Path]:
    """Give a folder that becomes `destination`, with the text files of `source`, at the block's end, if it ends well.

    Args:
        destination: of the new checkpoint; directories above it are made if they are not there.
        source: directory of the one that it is made from.
        num_bytes: of the weights.

    Raises:
        ValueError: naming the directory that cannot be written, or what is in the way.
    """
    check_destination(destination, source)
    texts = {name: read_bytes(source / name) for name in TEXT_FILES if (source / name).is_file()}
    check_room(destination, num_bytes + sum(map(len, texts.values())))
    with _parents(destination), NewDirectory(destination) as new:
        for name, content in texts.items():
            write_file(new.path / name, content)
        yield new.path


def check_destination(destination: Path, source: Path) -> None:
    """Raise ValueError if `destination` is there, would be inside `source`, or cannot be looked for."""
    try:
        _check_place(destination, source)
    except OSError as error:
        raise unwritable(destination, error) from error


def _check_place(destination: Path, source: Path) -> None:
    resolved, origin = destination.resolve(), source.resolve()
    if resolved == origin:
        raise ValueError(f"{destination}: is the checkpoint that is read; write to a directory of another name")
    if origin in resolved.parents:
        raise ValueError(f"{destination}: is inside {source}, which is read; write to a directory outside of it")
    if destination.exists() or destination.is_symlink():
        raise ValueError(f"{destination}: is there already; nothing is overwritten: remove it, or take another name")


def check_room(destination: Path, num_bytes: int) -> None:
    """Raise ValueError if its disk has no room for so many bytes."""
    existing = next(path for path in (destination.absolute(), *destination.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        needed = f"{format_bytes(num_bytes)} are to be written"
        raise ValueError(f"{destination}: {needed}, and its disk has room for {format_bytes(free)}")


def write_file(path: Path, content: bytes) -> None:
    """Write a small file, and wait until it is on the disk."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _parents(destination: Path) -> Iterator[None]:
    """Make the directories above `destination` that are not there; without it in the end, remove them again."""
    missing = [path for path in destination.parents if not path.exists()]
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise unwritable(error.filename or destination, error) from error
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # where `destination` is in it, it is not empty
                path.rmdir()
