"""Writes a safetensors file one tensor after the other: it never holds more than one in memory."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from engine.checkpoint.checksum import new_checksum
from engine.checkpoint.tensor_header import ALIGNMENT, DTYPE_NAMES, is_filler, make_header

CHUNK_BYTES = 8 << 20  # hashed and written at once, while it is in the processor's cache
SYNC_BYTES = 64 << 20  # after which the disk must have them, so that no wait for it is long
FILE_FORMAT = {"format": "pt"}  # what transformers asks for


def file_size(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    alignment: int = ALIGNMENT,
    texts: Mapping[str, str] | None = None,
) -> int:
    """Return how many bytes a file of these tensors has, header and fillers included. See `TensorFileWriter`."""
    named = [(name, DTYPE_NAMES[dtype], shape) for name, dtype, shape in tensors]
    header, places = make_header(named, {**FILE_FORMAT, **(texts or {})}, alignment)
    return max((place.stop for place in places.values()), default=len(header))


class TensorFileWriter:
    """A new file of tensors that lie at multiples of 64 bytes. Use it as a context manager.

        with TensorFileWriter(path, [("weight", torch.float32, (2, 3))]) as writer:
            writer.write("weight", tensor)

    At its end the file is whole and on the disk; where an exception ends it, the file is left as it is.

    Args:
        path: of a file that is not there yet.
        tensors: name, type and shape of each, in the order in which they will be written.
        metadata: texts for the header, beside the format.
        alignment: bytes; with 1 there are no fillers, which other programs take for tensors.
        advance: is told of the bytes that were written, some MiB at a time; what it raises ends the writing.

    Raises:
        OSError: (any method) if the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        alignment: int = ALIGNMENT,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.path = path
        self._advance = advance
        self.size = 0  # bytes written
        self._synced = 0  # of these, on the disk
        self._checksum = new_checksum()
        self._header, self._places = make_header(
            [(name, DTYPE_NAMES[dtype], shape) for name, dtype, shape in tensors],
            {**FILE_FORMAT, **(metadata or {})},
            alignment,
        )
        self._waiting = list(reversed(self._places))

    def __enter__(self) -> Self:
        self._file = self.path.open("xb", buffering=0)
        try:
            self._put(self._header)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                assert not self._waiting, f"{self.path}: {self._waiting} were not written"
                os.fsync(self._file.fileno())

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, which must be of the type and shape that were announced; from any device."""
        while is_filler(self._waiting[-1]):
            self._put(bytes(self._places[self._waiting.pop()].num_bytes))
        place = self._places[self._waiting.pop()]
        assert self._places[name] is place, f"{name} is not what was announced"
        assert (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) == (place.dtype, place.shape), name
        if place.num_bytes:
            self._put(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    @property
    def checksum(self) -> str:
        """The checksum of all that was written, as hexadecimal digits."""
        return self._checksum.hexdigest()

    def _put(self, content: bytes | memoryview) -> None:
        rest = memoryview(content)
        while rest:
            # Up to a multiple of the chunk's size: so the system can keep it in huge pages, and map it as such.
            size = min(len(rest), CHUNK_BYTES - self.size % CHUNK_BYTES)
            chunk, rest = rest[:size], rest[size:]
            self._checksum.update(chunk)
            while chunk:
                chunk = chunk[self._file.write(chunk) :]
            self.size += size
            if self.size - self._synced >= SYNC_BYTES:
                os.fdatasync(self._file.fileno())
                self._synced = self.size
            self._advance(size)
