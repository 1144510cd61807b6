"""`ryzanstein checkpoint export`: any checkpoint becomes a Hugging Face directory, which other programs read."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec
from torch import Tensor

from engine.checkpoint.convert import Start
from engine.checkpoint.destination import new_checkpoint, write_file
from engine.checkpoint.huggingface import INDEX_FILE, SINGLE_FILE
from engine.checkpoint.layout import Place, fill_files
from engine.checkpoint.stored_model import StoredModel
from engine.checkpoint.targets import Target
from engine.checkpoint.tensor_writer import TensorFileWriter
from engine.protocol.commands import ExportCommand
from engine.protocol.model_directory import CONFIG_FILE

NO_FILLERS = 1  # byte of alignment


@dataclass(frozen=True)
class _File:
    """What goes into one file: targets, which are taken apart into the tensors that Hugging Face knows."""

    name: str
    targets: list[Target]

    @property
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return (item for target in self.targets for item in taken_apart(target))


def export(command: ExportCommand, start: Start) -> list[str]:
    """Write a Hugging Face directory, and return the names of its weight files.

    Every tensor is there once, as it is stored: without padding, fused ones taken apart, tied ones under the
    embedding's name. Of the weights no more is in memory than one tensor of the model.

    Args:
        command: what to read, and what to write.
        start: shows how far it has come.

    Raises:
        ValueError: naming the file and the tensor that cannot be read, or why nothing can be written.
    """
    with StoredModel.open(command.source) as model:
        files = _lay_out(model.targets(1), command.max_file_size)
        total = sum(target.tensor.nbytes for file in files for target in file.targets)
        with new_checkpoint(Path(command.destination), model.directory, total) as directory:
            advance = start(total)
            for file in files:
                _write(directory / file.name, file, model, advance)
            if len(files) > 1:
                write_file(directory / INDEX_FILE, _index(files, total))
            config = msgspec.json.format(msgspec.json.encode(model.raw_config), indent=2)
            write_file(directory / CONFIG_FILE, config + b"\n")
    return [file.name for file in files]


def taken_apart(target: Target) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a whole target consists of, by the first of their names: views of it."""
    return ((piece.sources[0], piece.run) for piece in target.pieces(0, 1))


def _lay_out(targets: list[Target], max_file_size: int) -> list[_File]:
    """Share the targets out over files, in order; within a file the widest type comes first, which aligns them all."""
    counts = fill_files([_places(target) for target in targets], max_file_size, NO_FILLERS)
    remaining = iter(targets)
    groups = [list(islice(remaining, count)) for count in counts]
    names = [f"model-{index:05}-of-{len(groups):05}.safetensors" for index in range(1, len(groups) + 1)]
    names = [SINGLE_FILE] if len(groups) == 1 else names
    widest_first = (sorted(group, key=lambda target: -target.tensor.element_size()) for group in groups)
    return [_File(name, group) for name, group in zip(names, widest_first, strict=True)]


def _places(target: Target) -> list[Place]:
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in taken_apart(target)]


def _write(path: Path, file: _File, model: StoredModel, advance: Callable[[int], None]) -> None:
    places = [place for target in file.targets for place in _places(target)]
    with TensorFileWriter(path, places, alignment=NO_FILLERS) as writer:
        for target in file.targets:
            for name, tensor in taken_apart(model.read(target, 0, 1)):
                writer.write(name, tensor)
            advance(target.tensor.nbytes)


def _index(files: list[_File], total: int) -> bytes:
    """Return `model.safetensors.index.json`: the file of each tensor."""
    parameters = sum(math.prod(tensor.shape) for file in files for _, tensor in file.tensors)
    weight_map = {name: file.name for file in files for name, _ in file.tensors}
    index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
    return msgspec.json.format(msgspec.json.encode(index), indent=2) + b"\n"
