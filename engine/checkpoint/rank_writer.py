"""What one rank adds to a checkpoint: the files with its part of each tensor, and checksums of what others have too."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from engine.checkpoint.checksum import new_checksum
from engine.checkpoint.metadata import FileMetadata, TensorMetadata, file_name, file_texts
from engine.checkpoint.targets import Target, targets_of
from engine.checkpoint.tensor_header import DTYPE_NAMES, METADATA_KEY, is_filler
from engine.checkpoint.tensor_writer import TensorFileWriter


class RankContents(msgspec.Struct):
    """What a rank has written."""

    files: list[FileMetadata]
    checksums: dict[str, list[str]]  # of each tensor's runs; empty for one that this rank alone has


class RankWriter:
    """Writes one rank's files.

    Args:
        directory: of the new checkpoint, which rank 0 made.
        tp_rank: the rank.
        tp_size: how many ranks write.
        check: is called after each few MiB; what it raises ends the writing.
    """

    def __init__(self, directory: Path, tp_rank: int, tp_size: int, check: Callable[[], None]) -> None:
        self._directory = directory
        self._tp_rank, self._tp_size = tp_rank, tp_size
        self._check = check

    def write(self, targets: Sequence[Target], tensors: Sequence[TensorMetadata], checkpoint_id: str) -> RankContents:
        """Write the rank's part of each target, as `tensors` says; tensors of any device.

        Args:
            targets: of the rank's model.
            tensors: what the metadata says of each.
            checkpoint_id: what all files of the checkpoint carry.

        Raises:
            OSError: naming the file that cannot be written.
        """
        contents = RankContents([], {})
        count = 1 + max((tensor.file_index for tensor in tensors), default=0)
        for index in range(count):
            in_file = [pair for pair in zip(targets, tensors, strict=True) if pair[1].file_index == index]
            texts = file_texts(checkpoint_id, self._tp_rank, self._tp_size, index)
            path = self._directory / file_name(self._tp_rank, index, count)
            size, checksum = self._write(path, texts, in_file, contents.checksums)
            contents.files.append(
                FileMetadata(name=path.name, rank=self._tp_rank, index=index, size=size, xxh3_128=checksum)
            )
        return contents

    def _write(
        self,
        path: Path,
        texts: dict[str, str],
        in_file: list[tuple[Target, TensorMetadata]],
        checksums: dict[str, list[str]],
    ) -> tuple[int, str]:
        """Write one file; return its size and checksum."""
        places = [(target.name, target.tensor.dtype, tuple(target.tensor.shape)) for target, _ in in_file]
        try:
            with TensorFileWriter(path, places, texts, advance=lambda _: self._check()) as writer:
                for target, tensor in in_file:
                    values = self._values_of(target)
                    checksums[target.name] = self._shared_checksums(values, tensor)
                    writer.write(target.name, values)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        return writer.size, writer.checksum

    def _values_of(self, target: Target) -> Tensor:
        """Return the rank's part of a target in host memory, with zeros for padding, whatever is there."""
        target = replace(target, tensor=target.tensor.detach().cpu())
        if not all(map(_is_zero, self._paddings(target))):
            target = replace(target, tensor=target.tensor.clone())
            for padding in self._paddings(target):
                padding.zero_()
        return target.tensor

    def _paddings(self, target: Target) -> list[Tensor]:
        return [piece.padding for piece in target.pieces(self._tp_rank, self._tp_size) if piece.padding.numel()]

    def _shared_checksums(self, values: Tensor, tensor: TensorMetadata) -> list[str]:
        """Return the checksum of each run, empty where no other rank has the same."""
        if tensor.dim is None:
            return [_checksum(values)] if self._tp_size > 1 else [""]
        dim = tensor.dim
        return [
            _checksum(values.narrow(dim, offset, part.local_size)) if part.num_shards < self._tp_size else ""
            for part, offset in tensor.spec.places()
        ]


def savable_targets(model: nn.Module) -> list[Target]:
    """Return the tensors of a model that go into a checkpoint.

    Raises:
        ValueError: naming the tensor that cannot be saved.
    """
    targets = targets_of(model)
    for target in targets:
        problem = _problem_of(target)
        if problem:
            raise ValueError(f"tensor {target.name} {problem}")
    return targets


def difference(tensors: Sequence[TensorMetadata], others: Sequence[TensorMetadata]) -> str:
    """Return which tensor two ranks do not have in the same way; nothing if there is none."""
    if tuple(tensors) == tuple(others):
        return ""
    own, its = ({tensor.name: tensor for tensor in each} for each in (tensors, others))
    for name in (*own, *its):
        if name not in own or name not in its:
            return f"tensor {name} is on one of them only"
        if own[name] != its[name]:
            return f"tensor {name} is {_described(own[name])} on one, and {_described(its[name])} on the other"
    return f"tensor {next(iter(its), '')} comes at another place in their order"


def unlike_copies(tensors: Sequence[TensorMetadata], contents: Sequence[RankContents]) -> str:
    """Return which tensor two ranks have different copies of; nothing if there is none.

    Args:
        tensors: of the model.
        contents: of each rank.
    """
    tp_size = len(contents)
    for tensor in tensors:
        shards = [part.num_shards for part in tensor.parts] or [1]
        for run, num_shards in enumerate(shards):
            for rank in range(tp_size):
                first = rank - rank % (tp_size // num_shards)
                if contents[rank].checksums[tensor.name][run] != contents[first].checksums[tensor.name][run]:
                    return f"tensor {tensor.name} should be the same on rank {first} and on rank {rank}, but differs"
    return ""


def _problem_of(target: Target) -> str:
    tensor = target.tensor
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"is a {type(tensor).__name__}; only plain tensors are saved, cut by parallel layers"
    if tensor.device.type == "meta":
        return "has no values: it is on the meta device"
    if tensor.layout != torch.strided or tensor.dtype not in DTYPE_NAMES:
        return f"is {tensor.dtype} of layout {tensor.layout}, which the files cannot hold"
    if target.name == METADATA_KEY or is_filler(target.name):
        return "has a name that means something else in the files"
    return ""


def _described(tensor: TensorMetadata) -> str:
    cut = f" cut along dimension {tensor.dim} as {tensor.parts}" if tensor.dim is not None else ""
    return f"{tensor.dtype} of shape {list(tensor.shape)}{cut}, in file {tensor.file_index}"


def _checksum(values: Tensor) -> str:
    checksum = new_checksum()
    if values.numel():
        checksum.update(_bytes_of(values).numpy().data)
    return checksum.hexdigest()


def _is_zero(values: Tensor) -> bool:
    return not _bytes_of(values).any()


def _bytes_of(values: Tensor) -> Tensor:
    return values.contiguous().flatten().view(torch.uint8)
