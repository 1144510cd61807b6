"""What `ryzanstein checkpoint inspect` tells of a checkpoint: from its configuration, its metadata and its headers."""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from engine.checkpoint.huggingface import weight_files
from engine.checkpoint.metadata import CheckpointMetadata
from engine.checkpoint.tensor_file import TensorFile
from engine.parallel.base import ShardPart
from engine.protocol.model_config import ModelConfig
from engine.protocol.model_directory import is_distributed, read_model_config


@dataclass(frozen=True, kw_only=True)
class FileContents:
    """One weights file."""

    name: str
    size: int  # bytes, as it is written down or, in a Hugging Face directory, found
    is_there: bool = True
    rank: int | None = None
    xxh3_128: str | None = None


@dataclass(frozen=True, kw_only=True)
class TensorContents:
    """One stored tensor."""

    name: str
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]  # of all ranks' together, without padding
    files: tuple[str, ...]
    local_shape: tuple[int, ...] | None = None  # in each rank's file, padding included
    dim: int | None = None
    parts: tuple[ShardPart, ...] = ()
    layout: str | None = None


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A checkpoint of either form. What a Hugging Face directory does not say is None."""

    path: str
    form: str  # "distributed" or "huggingface"
    format_version: int | None = None
    name: str
    step: int | None = None
    architecture: str | None
    parameters: int
    dtype: str | None
    tp_size: int | None = None
    tensor_parallel_sizes: list[int] | None  # that it can be loaded at; None where its architecture is not known
    config: dict[str, Any]
    extra: dict[str, Any]
    files: tuple[FileContents, ...]
    tensors: tuple[TensorContents, ...]

    def to_json(self) -> str:
        """Return all of it as one JSON document."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode() + "\n"


def contents_of(directory: Path) -> Contents:
    """Read what a checkpoint says of itself; no weights are read.

    Raises:
        ValueError: naming the file that is missing or cannot be read.
    """
    return _of_distributed(directory) if is_distributed(directory) else _of_huggingface(directory)


def _of_distributed(directory: Path) -> Contents:
    metadata = CheckpointMetadata.read(directory)
    files = tuple(
        FileContents(
            name=file.name,
            size=file.size,
            is_there=(directory / file.name).is_file(),
            rank=file.rank,
            xxh3_128=file.xxh3_128,
        )
        for file in metadata.files
    )
    tensors = tuple(
        TensorContents(
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            files=tuple(metadata.file_of(tensor, rank).name for rank in range(metadata.tp_size)),
            local_shape=tensor.local_shape,
            dim=tensor.dim,
            parts=tensor.parts,
            layout=tensor.layout,
        )
        for tensor in metadata.tensors
    )
    return Contents(
        path=str(directory),
        form="distributed",
        format_version=metadata.format_version,
        name=metadata.model_name,
        step=metadata.step,
        architecture=_architecture(metadata.config),
        parameters=metadata.model_size,
        dtype=metadata.dtype,
        tp_size=metadata.tp_size,
        tensor_parallel_sizes=_possible_sizes(metadata.config),
        config=metadata.config,
        extra=metadata.extra,
        files=files,
        tensors=tensors,
    )


def _of_huggingface(directory: Path) -> Contents:
    config, _ = read_model_config(directory)
    files, tensors = [], []
    for path in weight_files(directory):
        with contextlib.closing(TensorFile(path, use_memory_map=False)) as file:
            files.append(FileContents(name=path.name, size=file.size))
            for name in file.names:
                place = file.places[name]
                tensors.append(TensorContents(name=name, dtype=place.dtype, shape=place.shape, files=(path.name,)))
    dtype = config.get("dtype") or config.get("torch_dtype")
    return Contents(
        path=str(directory),
        form="huggingface",
        name=directory.absolute().name,
        architecture=_architecture(config),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        dtype=dtype if isinstance(dtype, str) else None,
        tensor_parallel_sizes=_possible_sizes(config),
        config=config,
        extra={},
        files=tuple(files),
        tensors=tuple(tensors),
    )


def _architecture(config: dict[str, Any]) -> str | None:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None


def _possible_sizes(config: dict[str, Any]) -> list[int] | None:
    try:
        return ModelConfig.from_object(config, "").tensor_parallel_sizes
    except ValueError:  # a model that is not served here may be looked at all the same
        return None
