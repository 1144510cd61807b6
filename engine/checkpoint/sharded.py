"""A distributed checkpoint as a source of tensors: put together from the ranks' files, wherever the slices lie."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.metadata import CheckpointMetadata, FileMetadata, TensorMetadata
from engine.checkpoint.source import TensorSource
from engine.checkpoint.staging import chunks
from engine.checkpoint.targets import TensorSlice, source_name
from engine.checkpoint.tensor_file import TensorFile
from engine.parallel.base import ShardPart
from engine.protocol.model_directory import METADATA_FILE


@dataclass(frozen=True)
class _Part:
    """One tensor as others know it, such as q_proj: a part of a stored one."""

    stored: TensorMetadata
    part: ShardPart | None  # None: it is stored whole, in each rank's file
    offset: int  # of its run in each rank's part of the stored tensor

    @property
    def shape(self) -> tuple[int, ...]:
        shape, dim = self.stored.shape, self.stored.dim
        if self.part is None or dim is None:
            return shape
        return (*shape[:dim], self.part.global_size, *shape[dim + 1 :])


class ShardedFiles(TensorSource):
    """The tensors of a distributed checkpoint, under the names that they have in a Hugging Face one.

    Files are opened when something in them is needed, and compared with the metadata then.

    Args:
        directory: of the checkpoint.
        metadata: what it holds.
        use_memory_map: see `TensorFile`.
        near: of what every rank's file has, the copy of this rank is read, or of the one that stands in its place.
        check: see `TensorFile`.

    Raises:
        ValueError: (each method that reads) naming the file and the tensor that is not as the metadata says.
    """

    def __init__(
        self,
        directory: Path,
        metadata: CheckpointMetadata,
        *,
        use_memory_map: bool = True,
        near: int = 0,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory = directory
        self.metadata = metadata
        self.quantization = metadata.quantization
        self._use_memory_map = use_memory_map
        self._near = near % metadata.tp_size
        self._check = check
        self._open_files: dict[str, TensorFile] = {}
        self._parts = {name: part for tensor in metadata.tensors for name, part in _parts_of(tensor)}

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    @property
    def names(self) -> list[str]:
        """The tensors' names, as a Hugging Face checkpoint has them."""
        return list(self._parts)

    def extras(self, names: set[str]) -> Iterator[str]:
        """See `TensorSource`."""
        extras = sorted(name for name in self._parts if name not in names)
        if extras:
            more = f", nor has it for {len(extras) - 1} more" if len(extras) > 1 else ""
            yield f"{self.path_of(extras[0])}: the model has no place for tensor {extras[0]}{more}"

    def dtype_of(self, name: str) -> str:
        """See `TensorSource`."""
        return self._parts[name].stored.dtype

    def shape_of(self, name: str) -> tuple[int, ...]:
        """See `TensorSource`."""
        return self._parts[name].shape

    def path_of(self, name: str) -> Path:
        """See `TensorSource`."""
        return self.directory / self.metadata.file_of(self._parts[name].stored, self._near).name

    def missing(self, name: str) -> str:
        """See `TensorSource`."""
        return f"{self.directory / METADATA_FILE}: tensor {name} is missing"

    def read_slice(self, name: str, wanted: TensorSlice) -> Tensor:
        """See `TensorSource`. What lies in one file is a view of it; what does not is put together in new memory."""
        part = self._parts[name]
        if part.part is None:
            return wanted.of(self.local(part.stored, self._near))
        if wanted.dim != part.stored.dim:  # asked for in one piece, or cut otherwise than it is stored
            assert part.stored.dim is not None
            whole = TensorSlice(wanted.global_shape, part.stored.dim, 0, part.part.global_size)
            return wanted.of(self._read_runs(part, part.part, whole))
        return self._read_runs(part, part.part, wanted)

    def local(self, stored: TensorMetadata, rank: int) -> Tensor:
        """Return a rank's part of a stored tensor, padding included."""
        return self.open(self.metadata.file_of(stored, rank)).read(stored.name)

    def open(self, file: FileMetadata) -> TensorFile:
        """Return one of the files, found to hold what the metadata says."""
        if file.name not in self._open_files:
            self._open_files[file.name] = self._open(file)
        return self._open_files[file.name]

    def open_all(self) -> list[Path]:
        """See `TensorSource`."""
        return [self.open(file).path for file in self.metadata.files]

    def close(self) -> None:
        """See `TensorSource`."""
        for file in self._open_files.values():
            file.close()

    def _read_runs(self, part: _Part, shards: ShardPart, wanted: TensorSlice) -> Tensor:
        """Put a slice together from the runs that it crosses."""
        runs = []
        for shard in range(shards.num_shards):
            first = shard * shards.local_size
            start, stop = max(wanted.start, first), min(wanted.stop, first + shards.local_size)
            if start < stop:
                runs.append(self._read_run(part, self._holder(shards, shard), start - first, stop - first))
        dim = part.stored.dim
        assert dim is not None
        return runs[0] if len(runs) == 1 else self._join(runs, dim, wanted.shape)

    def _join(self, runs: list[Tensor], dim: int, shape: tuple[int, ...]) -> Tensor:
        joined, start = torch.empty(shape, dtype=runs[0].dtype), 0
        for run in runs:
            for target, values in chunks(joined.narrow(dim, start, run.shape[dim]), run):
                self._check()
                target.copy_(values)
            start += run.shape[dim]
        return joined

    def _read_run(self, part: _Part, rank: int, start: int, stop: int) -> Tensor:
        file = self.open(self.metadata.file_of(part.stored, rank))
        place = TensorSlice(part.stored.local_shape, part.stored.dim, part.offset + start, part.offset + stop)
        return file.read(part.stored.name, place)

    def _holder(self, shards: ShardPart, shard: int) -> int:
        """Return a rank that holds a run: of several, ranks that read choose different ones."""
        replicas = self.metadata.tp_size // shards.num_shards
        return shard * replicas + self._near % replicas

    def _open(self, file: FileMetadata) -> TensorFile:
        path = self.directory / file.name
        if not path.is_file():
            raise ValueError(f"{path}: is missing; {METADATA_FILE} names it as a file of rank {file.rank}")
        opened = TensorFile(path, use_memory_map=self._use_memory_map, check=self._check)
        try:
            for problem in file_problems(opened, file, self.metadata):
                raise ValueError(problem)
        except BaseException:
            opened.close()
            raise
        return opened


def file_problems(opened: TensorFile, file: FileMetadata, metadata: CheckpointMetadata) -> Iterator[str]:
    """Yield where an open file differs from what the metadata says of it; its checksum is not computed."""
    if opened.size != file.size:
        yield f"{opened.path}: has {opened.size} bytes, but {METADATA_FILE} says {file.size}"
    expected = {tensor.name: tensor for tensor in metadata.tensors_in(file)}
    for tensor in expected.values():
        yield from _tensor_problems(opened, tensor)
    for name in opened.names:
        if name not in expected:
            yield f"{opened.path}: tensor {name} is not in {METADATA_FILE}"
    yield from _mix_ups(opened, file, metadata)


def _tensor_problems(opened: TensorFile, tensor: TensorMetadata) -> Iterator[str]:
    place, where = opened.places.get(tensor.name), f"{opened.path}: tensor {tensor.name}"
    if place is None:
        yield f"{where} is missing"
    elif place.dtype != tensor.dtype:
        yield f"{where} is of type {place.dtype}, but {METADATA_FILE} says {tensor.dtype}"
    elif place.shape != tensor.local_shape:
        yield f"{where} has shape {list(place.shape)}, but {METADATA_FILE} says {list(tensor.local_shape)}"


def _mix_ups(opened: TensorFile, file: FileMetadata, metadata: CheckpointMetadata) -> Iterator[str]:
    """Yield what is wrong with a file that is whole, but belongs elsewhere: its tensors would fit all the same."""
    expected = metadata.file_texts(file.rank, file.index)
    found = {name: opened.texts.get(name, "") for name in expected}
    if found["checkpoint"] != expected["checkpoint"]:
        yield f"{opened.path}: is of another checkpoint than {METADATA_FILE}"
    elif found != expected:
        place = f"file {found['file_index']} of rank {found['rank']}"
        yield f"{opened.path}: is {place}, but {METADATA_FILE} says file {file.index} of rank {file.rank}"


def _parts_of(tensor: TensorMetadata) -> Iterator[tuple[str, _Part]]:
    if tensor.dim is None:
        yield tensor.name, _Part(tensor, None, 0)
    for part, offset in tensor.spec.places():
        yield source_name(tensor.name, part), _Part(tensor, part, offset)
