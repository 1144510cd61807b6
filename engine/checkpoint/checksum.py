"""The checksum of files: XXH3, 128 bits. It finds what went wrong by accident; it does not keep out who means harm."""

import os
from collections.abc import Callable
from pathlib import Path

import xxhash

from engine.checkpoint.retry import retrying

CHUNK_BYTES = 8 << 20  # read at once


def new_checksum() -> "xxhash.xxh3_128":
    """Return a checksum of nothing, to be updated."""
    return xxhash.xxh3_128()


def file_checksum(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """Return the checksum of a file's bytes, as hexadecimal digits.

    Args:
        path: the file.
        advance: is told of the bytes that were read, some MiB at a time; what it raises ends the reading.

    Raises:
        ValueError: naming the file, if it cannot be read.
    """
    checksum = new_checksum()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with retrying(path, lambda: path.open("rb", buffering=0)) as file:
        offset = 0
        while count := _read_at(path, file.fileno(), buffer, offset):
            checksum.update(buffer[:count])
            offset += count
            advance(count)
    return checksum.hexdigest()


def _read_at(path: Path, descriptor: int, buffer: memoryview, offset: int) -> int:
    return retrying(path, lambda: os.preadv(descriptor, [buffer], offset))
