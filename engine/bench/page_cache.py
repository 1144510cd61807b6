"""Brings files into the system's page cache, drops them from it, and looks whether that was done."""

import os
from collections.abc import Iterable
from pathlib import Path

from engine.bench.touch import map_file
from engine.checkpoint.mapped_memory import MappedMemory

CHUNK_BYTES = 8 << 20


def read_files(paths: Iterable[Path]) -> None:
    """Read files, so that they are in the page cache if it has room."""
    buffer = bytearray(CHUNK_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop_files(paths: Iterable[Path]) -> None:
    """Ask the system to drop files from the page cache; it keeps what some process has mapped and used."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            os.fsync(file.fileno())  # what is not on the disk yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_share(paths: Iterable[Path]) -> float:
    """Return which share of the files' bytes is in the page cache, estimated from some pages of each.

    The system tells all of a file that this process may not write.
    """
    return MappedMemory([(str(path), map_file(path)) for path in paths if path.stat().st_size]).resident_share()
