"""`ryzanstein checkpoint shard`: any checkpoint becomes a distributed one, cut for a number of ranks."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.destination import new_checkpoint, write_file
from engine.checkpoint.layout import lay_out
from engine.checkpoint.metadata import CheckpointMetadata, FileMetadata, TensorMetadata, file_name
from engine.checkpoint.sharded import ShardedFiles
from engine.checkpoint.stored_model import StoredModel
from engine.checkpoint.targets import Target
from engine.checkpoint.tensor_writer import TensorFileWriter
from engine.protocol.commands import ShardCommand
from engine.protocol.model_directory import METADATA_FILE

Start = Callable[[int], Callable[[int], None]]  # takes the bytes that there are to do; returns what counts those done


def shard(command: ShardCommand, start: Start) -> CheckpointMetadata:
    """Write a distributed checkpoint, and return what it holds. The same input gives the same bytes.

    Of the weights no more is in memory than one tensor.

    Args:
        command: what to read, and what to write.
        start: shows how far it has come.

    Raises:
        ValueError: naming the file and the tensor that cannot be read, or why nothing can be written.
    """
    with StoredModel.open(command.source) as model:
        dtype = None if command.dtype == "auto" else getattr(torch, command.dtype)
        targets = model.targets(command.tensor_parallel_size, dtype, command.quantization)
        tensors = lay_out(targets, max_file_size=command.max_file_size)
        metadata = _describe(model, command, tensors, dtype)
        total = metadata.weight_bytes * metadata.tp_size
        with new_checkpoint(Path(command.destination), model.directory, total) as directory:
            files = _Writer(directory, model, metadata, start(total)).write(targets)
            metadata = replace(metadata, files=files)
            write_file(directory / METADATA_FILE, metadata.to_json())
    return metadata


class _Writer:
    """Writes all ranks' files side by side, so that each tensor of the source is read once."""

    def __init__(
        self, directory: Path, model: StoredModel, metadata: CheckpointMetadata, advance: Callable[[int], None]
    ) -> None:
        self._directory, self._model, self._metadata, self._advance = directory, model, metadata, advance

    def write(self, targets: list[Target]) -> tuple[FileMetadata, ...]:
        """Write the files of every rank."""
        tensors = self._metadata.tensors
        count = 1 + max(tensor.file_index for tensor in tensors)
        files = []
        for index in range(count):
            own = [target for target, tensor in zip(targets, tensors, strict=True) if tensor.file_index == index]
            files += self._write_files(own, index, count)
        return tuple(sorted(files, key=lambda file: (file.rank, file.index)))

    def _write_files(self, targets: list[Target], index: int, count: int) -> list[FileMetadata]:
        """Write a file of each rank."""
        places = [(target.name, target.tensor.dtype, tuple(target.tensor.shape)) for target in targets]
        tp_size = self._metadata.tp_size
        paths = [self._directory / file_name(rank, index, count) for rank in range(tp_size)]
        with contextlib.ExitStack() as closing:
            writers = [
                closing.enter_context(TensorFileWriter(path, places, self._metadata.file_texts(rank, index)))
                for rank, path in enumerate(paths)
            ]
            for target in targets:
                for rank, writer in enumerate(writers):
                    writer.write(target.name, self._model.read(target, rank, tp_size).tensor)
                    self._advance(target.tensor.nbytes)
        return [
            FileMetadata(name=writer.path.name, rank=rank, index=index, size=writer.size, xxh3_128=writer.checksum)
            for rank, writer in enumerate(writers)
        ]


def _describe(
    model: StoredModel, command: ShardCommand, tensors: tuple[TensorMetadata, ...], dtype: torch.dtype | None
) -> CheckpointMetadata:
    """Return the metadata, without files. Name and step of a distributed source stay."""
    if isinstance(model.source, ShardedFiles):
        origin = model.source.metadata
    else:  # as it is written: a link is often the name, and what it leads to a hash
        origin = CheckpointMetadata(model_name=Path(os.path.normpath(Path(command.source).absolute())).name)
    named = replace(
        origin,
        model_name=command.model_name or origin.model_name,
        config=model.raw_config if dtype is None else with_dtype(model.raw_config, _name(dtype)),
    )
    return named.of_tensors(tensors, command.tensor_parallel_size)


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return what `config.json` says, of weights in another type. It has one spelling or the other, or both."""
    spellings = [name for name in ("dtype", "torch_dtype") if config.get(name) is not None] or ["dtype"]
    return {**config, **dict.fromkeys(spellings, dtype)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
