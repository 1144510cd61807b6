"""Reads tensors of a safetensors file, from where they lie: mapped, or just the bytes that are asked for."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.mapped_memory import map_privately
from engine.checkpoint.retry import retrying
from engine.checkpoint.targets import TensorSlice
from engine.checkpoint.tensor_header import (
    LENGTH_BYTES,
    TORCH_DTYPES,
    TensorPlace,
    header_length,
    is_filler,
    parse_header,
    parse_texts,
)

CHUNK_BYTES = 16 << 20  # read at once


class TensorFile:
    """One safetensors file.

    Args:
        path: of the file.
        use_memory_map: whether tensors are views of the mapped file, which read nothing before they are used and share
            their memory with other processes that map it; else reads fill memory of their own.
        check: is called between two reads of some MiB; what it raises ends the reading.

    Raises:
        ValueError: naming the file, if it cannot be read, or is not a whole safetensors file.
    """

    def __init__(self, path: Path, *, use_memory_map: bool = True, check: Callable[[], None] = lambda: None) -> None:
        self.path = path
        self._check = check
        self._descriptor = retrying(path, lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        try:
            self.size = os.fstat(self._descriptor).st_size
            self.places = self._read_places()
            self._mapped = self._map() if use_memory_map else None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; what is mapped stays as long as a tensor lies in it. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def names(self) -> list[str]:
        """The tensors' names, without fillers."""
        return [name for name in self.places if not is_filler(name)]

    @property
    def data(self) -> Tensor:
        """All bytes of the mapped file, `[size]` uint8."""
        assert self._mapped is not None, "not mapped"
        return self._mapped

    def read(self, name: str, wanted: TensorSlice | None = None) -> Tensor:
        """Return a tensor, or a slice of it: a view of the mapped file, or new memory.

        Other parts of the file are not read. Mapped memory may be written to; the file never changes.

        Raises:
            ValueError: naming the file, if the bytes cannot be read.
        """
        place = self.places[name]
        wanted = wanted or TensorSlice(place.shape)
        dtype = TORCH_DTYPES[place.dtype]
        if self._mapped is None or place.start % dtype.itemsize:  # as in some other programs' files: no view can be had
            return self._read(place, wanted)
        return wanted.of(self._mapped[place.start : place.stop].view(dtype).view(place.shape))

    def _read_places(self) -> dict[str, TensorPlace]:
        start = self._head(min(LENGTH_BYTES, self.size))
        try:
            length = header_length(start, self.size)
        except ValueError as error:
            raise self._not_whole(error) from error
        content = self._head(LENGTH_BYTES + length)
        try:
            self.texts = parse_texts(content, self.size)
            return parse_header(content, self.size)
        except ValueError as error:
            raise self._not_whole(error) from error

    def _head(self, count: int) -> bytes:
        content = bytearray(count)
        self._fill(memoryview(content), 0)
        return bytes(content)

    def _not_whole(self, error: ValueError) -> ValueError:
        return ValueError(f"{self.path}: is no whole safetensors file ({error}); was it downloaded completely?")

    def _map(self) -> Tensor:
        try:
            return map_privately(self._descriptor, self.size)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path}: cannot be mapped into memory: {error}; try --no-mmap") from error

    def _read(self, place: TensorPlace, wanted: TensorSlice) -> Tensor:
        """Read the runs of bytes that a slice consists of: one, or one for each index before the cut dimension."""
        values = torch.empty(wanted.shape, dtype=TORCH_DTYPES[place.dtype])
        if values.numel() == 0:
            return values
        before = math.prod(wanted.global_shape[: wanted.dim or 0])
        stride, run = place.num_bytes // before, values.nbytes // before  # bytes from one run to the next, and of one
        skipped = 0 if wanted.dim is None else wanted.start * (stride // wanted.global_shape[wanted.dim])
        target = values.flatten().view(torch.uint8).numpy().data
        for index in range(before):
            self._fill(target[index * run : (index + 1) * run], place.start + index * stride + skipped)
        return values

    def _fill(self, target: memoryview, offset: int) -> None:
        while target:
            self._check()
            count = retrying(self.path, _preadv(self._descriptor, target[:CHUNK_BYTES], offset))
            if count == 0:
                raise ValueError(f"{self.path}: ends at byte {offset}; it was longer when it was opened")
            target, offset = target[count:], offset + count


def _preadv(descriptor: int, target: memoryview, offset: int) -> Callable[[], int]:
    return lambda: os.preadv(descriptor, [target], offset)
