"""`metadata.json`: what a distributed checkpoint holds, and how it is cut over its files.

    {"format_version": 1, "model_name": "…", "model_size": 1235814400, "step": 1000, "dtype": "bfloat16", "tp_size": 2,
     "config": {…},                                                                     as config.json has it
     "files": [{"name": "weights_rank0.safetensors", "rank": 0, "index": 0, "size": …, "xxh3_128": "…"}, …],
     "tensors": [{"name": "model.layers.0.self_attn.qkv_proj.weight", "dtype": "BF16", "shape": [3072, 2048], "dim": 0,
                  "parts": [{"source": "q_proj", "global_size": 2048, "padded_size": 2048, "num_shards": 2}, …],
                  "layout": "row_major", "file_index": 0}, …]}

A tensor is named as the engine's parameter. Its shape is that of all ranks' together, without padding; `dim` and
`parts` are its `ShardSpec` (engine/parallel/base.py), which says what each rank's file holds of it. Every rank has as
many files as the others, numbered by `index`, and a tensor is in those of its `file_index`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from engine.checkpoint.checksum import new_checksum
from engine.checkpoint.retry import read_bytes
from engine.checkpoint.targets import source_name
from engine.checkpoint.tensor_header import TORCH_DTYPES
from engine.parallel.base import ShardPart, ShardSpec
from engine.protocol.model_config import LARGEST_SIZE, MOST_RANKS
from engine.protocol.model_directory import METADATA_FILE

FORMAT_VERSION = 1
ROW_MAJOR = "row_major"
NO_CHECKPOINT = "0" * 32  # as long as the id of one
LAYOUTS = (ROW_MAJOR,)


@dataclass(frozen=True, kw_only=True)
class FileMetadata:
    """One weights file."""

    name: str
    rank: int
    index: int  # among the files of its rank
    size: int  # bytes
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class TensorMetadata:
    """One parameter of the model."""

    name: str
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]  # of all ranks' together, without padding
    dim: int | None = None  # along which it is cut; None: every rank has it whole
    parts: tuple[ShardPart, ...] = ()
    layout: str = ROW_MAJOR
    file_index: int = 0

    @property
    def spec(self) -> ShardSpec:
        """How it is cut."""
        return ShardSpec(self.dim, self.parts)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Its shape in each rank's file, padding included."""
        if self.dim is None:
            return self.shape
        return (*self.shape[: self.dim], self.spec.local_size, *self.shape[self.dim + 1 :])

    @property
    def local_bytes(self) -> int:
        """Its size in each rank's file."""
        return math.prod(self.local_shape) * TORCH_DTYPES[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True)
class CheckpointMetadata:
    """What a distributed checkpoint holds.

    Who saves one gives the first four; the saver fills in the others.
    """

    model_name: str
    config: dict[str, Any] = field(default_factory=dict)  # as config.json has it
    step: int = 0
    extra: dict[str, Any] = field(default_factory=dict)  # whatever else is to be remembered, as JSON
    model_size: int = 0  # parameters
    dtype: str = ""  # of most weights, as torch spells it
    tp_size: int = 1
    checkpoint_id: str = ""  # which its files carry too, and those of another name, step, configuration or cut do not
    files: tuple[FileMetadata, ...] = ()
    tensors: tuple[TensorMetadata, ...] = ()
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes: plain values, as JSON has them."""
        content: dict[str, Any] = msgspec.to_builtins(self)
        return content

    @classmethod
    def from_dict(cls, content: object) -> "CheckpointMetadata":
        """Take what `to_dict` returned.

        Raises:
            ValueError: naming the entry that is missing, of the wrong type, or contradicts another.
        """
        _check_version(content)
        metadata = msgspec.convert(content, cls)  # its errors are ValueErrors that name the entry
        _check(metadata)
        return metadata

    @classmethod
    def parse(cls, content: bytes, path: Path) -> "CheckpointMetadata":
        """Take what `metadata.json` holds; errors say that it stands in `path`.

        Raises:
            ValueError: see `from_dict`.
        """
        try:
            decoded = msgspec.json.decode(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
        try:
            return cls.from_dict(decoded)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def read(cls, directory: Path) -> "CheckpointMetadata":
        """Read `metadata.json` of a checkpoint.

        Raises:
            ValueError: naming the file, and the entry that cannot be used.
        """
        path = directory / METADATA_FILE
        return cls.parse(read_bytes(path), path)

    def to_json(self) -> bytes:
        """Return what `metadata.json` holds, a line an entry."""
        return msgspec.json.format(msgspec.json.encode(self.to_dict()), indent=1) + b"\n"

    def of_tensors(self, tensors: tuple[TensorMetadata, ...], tp_size: int) -> "CheckpointMetadata":
        """Return what describes these tensors, cut for so many ranks, under the same name; their files are to come."""
        sizes = Counter[str]()
        for tensor in tensors:
            sizes[tensor.dtype] += math.prod(tensor.shape)
        types = [TORCH_DTYPES[name] for name, _ in sizes.most_common()]
        floating = [dtype for dtype in types if dtype.is_floating_point]
        weights = types if _quantization_of(tensors) == "int8" else floating
        identity = new_checksum()
        content = [self.model_name, self.step, self.config, tensors]
        identity.update(msgspec.json.encode(content, enc_hook=str))  # what JSON cannot hold is refused elsewhere
        return replace(
            self,
            checkpoint_id=identity.hexdigest(),
            model_size=sizes.total(),
            dtype=str(weights[0]).removeprefix("torch.") if weights else "",
            tp_size=tp_size,
            files=(),
            tensors=tensors,
            format_version=FORMAT_VERSION,
        )

    def file_texts(self, rank: int, index: int) -> dict[str, str]:
        """Return the texts in the header of a rank's file, which tell it from all others."""
        return file_texts(self.checkpoint_id, rank, self.tp_size, index)

    @cached_property
    def quantization(self) -> str:
        """Of its matrices, as `--quantization` has it."""
        return _quantization_of(self.tensors)

    @property
    def weight_bytes(self) -> int:
        """What each rank's weights take, padding included."""
        return sum(tensor.local_bytes for tensor in self.tensors)

    @cached_property
    def tensor_of(self) -> dict[str, TensorMetadata]:
        """The tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def _file_of(self) -> dict[tuple[int, int], FileMetadata]:
        return {(file.rank, file.index): file for file in self.files}

    def file_of(self, tensor: TensorMetadata, rank: int) -> FileMetadata:
        """Return the file with a rank's part of a tensor."""
        return self._file_of[rank, tensor.file_index]

    def files_of(self, rank: int) -> list[FileMetadata]:
        """Return a rank's files, in order."""
        return [self._file_of[rank, index] for index in range(len(self.files) // self.tp_size)]

    def tensors_in(self, file: FileMetadata) -> Iterator[TensorMetadata]:
        """Yield the tensors that a file holds a part of, in order."""
        return (tensor for tensor in self.tensors if tensor.file_index == file.index)


def _quantization_of(tensors: Iterable[TensorMetadata]) -> str:
    is_int8 = any(tensor.dtype == "I8" and tensor.name.endswith(".weight") for tensor in tensors)
    return "int8" if is_int8 else "none"


def file_texts(checkpoint_id: str, rank: int, tp_size: int, index: int) -> dict[str, str]:
    """Return the texts in the header of a rank's file: of which checkpoint it is which."""
    return {"checkpoint": checkpoint_id, "rank": str(rank), "tp_size": str(tp_size), "file_index": str(index)}


def file_name(rank: int, index: int = 0, count: int = 1) -> str:
    """Return the name of a rank's file, the `index`-th of `count`."""
    number = "" if count == 1 else f"-{index + 1:05}-of-{count:05}"
    return f"weights_rank{rank}{number}.safetensors"


def _check_version(content: object) -> None:
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError("has no format_version: it is no distributed checkpoint's")
    if version > FORMAT_VERSION:
        raise ValueError(f"format_version {version} is newer than {FORMAT_VERSION}, the newest that is known here")


def _check(metadata: CheckpointMetadata) -> None:
    if not 1 <= metadata.tp_size <= MOST_RANKS:
        raise ValueError(f"tp_size must be between 1 and {MOST_RANKS}, not {metadata.tp_size}")
    if metadata.step < 0:
        raise ValueError(f"step must not be negative: {metadata.step}")
    files_per_rank = _check_files(metadata)
    for tensor in metadata.tensors:
        problem = _tensor_problem(tensor, metadata.tp_size, files_per_rank)
        if problem:
            raise ValueError(f"tensor {tensor.name} {problem}")
    _check_names(tensor.name for tensor in metadata.tensors)
    _check_names(name for tensor in metadata.tensors for name in _source_names(tensor))


def _check_names(names: Iterable[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"tensor {name} is there twice")


def _source_names(tensor: TensorMetadata) -> list[str]:
    """Return the names that its parts go by in a Hugging Face checkpoint."""
    return [source_name(tensor.name, part) for part in tensor.parts] or [tensor.name]


def _check_files(metadata: CheckpointMetadata) -> int:
    """Check that every rank has the same number of files; return it."""
    per_rank, rest = divmod(len(metadata.files), metadata.tp_size)
    places = {(file.rank, file.index) for file in metadata.files}
    expected = {(rank, index) for rank in range(metadata.tp_size) for index in range(per_rank)}
    if rest or places != expected:
        raise ValueError(f"files: must be the same number for each of {metadata.tp_size} ranks")
    names = [file.name for file in metadata.files]
    if len(set(names)) != len(names):
        raise ValueError("files: two have the same name")
    for file in metadata.files:
        if file.name in ("", ".", "..") or "/" in file.name or "\0" in file.name:
            raise ValueError(f"files: must be in the same directory, not {file.name!r}")
        if file.size < 0:
            raise ValueError(f"files: {file.name} cannot have {file.size} bytes")
    return per_rank


def _tensor_problem(tensor: TensorMetadata, tp_size: int, files_per_rank: int) -> str:
    if tensor.layout not in LAYOUTS:
        return f"has layout {tensor.layout!r}; known: {', '.join(LAYOUTS)}"
    if tensor.dtype not in TORCH_DTYPES:
        return f"is of type {tensor.dtype!r}; known: {', '.join(TORCH_DTYPES)}"
    if not all(0 <= size <= LARGEST_SIZE for size in tensor.shape):
        return f"has shape {list(tensor.shape)}"
    if not 0 <= tensor.file_index < files_per_rank:
        return f"is in file {tensor.file_index} of each rank, which has {files_per_rank}"
    return _split_problem(tensor, tp_size)


def _split_problem(tensor: TensorMetadata, tp_size: int) -> str:
    if tensor.dim is None:
        return "is whole, but has parts" if tensor.parts else ""
    if not 0 <= tensor.dim < len(tensor.shape):
        return f"is cut along dimension {tensor.dim} of {len(tensor.shape)}"
    for part in tensor.parts:
        fits = 0 <= part.global_size <= part.padded_size <= LARGEST_SIZE and 1 <= part.num_shards <= tp_size
        if not fits or part.padded_size % part.num_shards or tp_size % part.num_shards:
            return f"cannot be cut as parts says: {part}"
        if part.source and "." not in tensor.name:
            return f"has a part {part.source!r}, but no module whose name that could replace"
    total = sum(part.global_size for part in tensor.parts)
    if total != tensor.shape[tensor.dim]:
        return f"has parts of {total} together, but {tensor.shape[tensor.dim]} in its shape"
    return ""
