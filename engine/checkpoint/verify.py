"""`ryzanstein checkpoint verify`: everything that is wrong with a checkpoint, as far as reading all of it can tell."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.convert import Start
from engine.checkpoint.destination import TEXT_FILES
from engine.checkpoint.huggingface import weight_files
from engine.checkpoint.integrity import checksum_problems
from engine.checkpoint.metadata import CheckpointMetadata, TensorMetadata
from engine.checkpoint.problems import header_problems, value_problems
from engine.checkpoint.sharded import ShardedFiles, file_problems
from engine.checkpoint.stored_model import StoredModel
from engine.checkpoint.tensor_file import TensorFile
from engine.protocol.model_directory import METADATA_FILE, is_distributed

NO_CHECKSUMS = "a Hugging Face checkpoint has no checksums: whether its bytes are still those written, nobody can tell"
NO_CONFIG = f"{METADATA_FILE} has no model configuration, which names and shapes could be compared with"


@dataclass
class Verdict:
    """What `verify` found."""

    directory: Path
    num_files: int = 0
    num_bytes: int = 0  # of these
    problems: list[str] = field(default_factory=list)  # each a line that names the file, and the tensor if it is one's
    notes: list[str] = field(default_factory=list)  # what is worth knowing, and no problem

    def add(self, problems: Iterator[str]) -> bool:
        """Take problems, those included that end the search for them; return whether there were none."""
        before = len(self.problems)
        try:
            self.problems.extend(problem for problem in problems if problem not in self.problems)
        except ValueError as error:
            self.problems.append(str(error))
        return len(self.problems) == before


def verify(directory: Path, start: Start) -> Verdict:
    """Look for everything that is wrong with a checkpoint.

    Args:
        directory: of a checkpoint of either form.
        start: shows how far it has come.
    """
    verdict = Verdict(directory)
    if is_distributed(directory):
        verdict.add(_verify_distributed(verdict, start))
    else:
        verdict.notes.append(NO_CHECKSUMS)
        verdict.add(_verify_huggingface(verdict))
    if not (directory / TEXT_FILES[0]).is_file():
        verdict.notes.append(f"{directory} has no {TEXT_FILES[0]}, without which it cannot be served")
    return verdict


# --- a distributed checkpoint ----------------------------------------------------------------------------------------


def _verify_distributed(verdict: Verdict, start: Start) -> Iterator[str]:
    directory = verdict.directory
    metadata = CheckpointMetadata.read(directory)
    verdict.num_files = len(metadata.files)
    verdict.num_bytes = sum(file.size for file in metadata.files)
    verdict.notes += _unknown_files(directory, metadata)
    verdict.add(_summary_problems(directory, metadata))
    are_files_whole = verdict.add(checksum_problems(directory, metadata, start(verdict.num_bytes)))
    are_files_whole &= verdict.add(_layout_problems(directory, metadata))
    if not metadata.config:
        verdict.notes.append(NO_CONFIG)
    elif verdict.add(_model_problems(directory)) and are_files_whole:
        verdict.add(_number_problems(directory))
    if are_files_whole:
        with ShardedFiles(directory, metadata) as source:
            yield from _copy_problems(source)


def _unknown_files(directory: Path, metadata: CheckpointMetadata) -> list[str]:
    known = {METADATA_FILE, *TEXT_FILES, *(file.name for file in metadata.files)}
    unknown = sorted(path.name for path in directory.iterdir() if path.name not in known)
    return [f"{directory / name} is no part of the checkpoint" for name in unknown]


def _summary_problems(directory: Path, metadata: CheckpointMetadata) -> Iterator[str]:
    """Yield where the metadata says of all tensors together what is not true of them."""
    actual = metadata.of_tensors(metadata.tensors, metadata.tp_size)
    for name in ("model_size", "dtype"):
        said, found = getattr(metadata, name), getattr(actual, name)
        if said != found:
            yield f"{directory / METADATA_FILE}: {name} is {said!r}, but that of the tensors is {found!r}"


def _layout_problems(directory: Path, metadata: CheckpointMetadata) -> Iterator[str]:
    """Yield where files that are as long as they should be hold other tensors than the metadata says."""
    for file in metadata.files:
        path = directory / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            continue
        try:
            opened = TensorFile(path, use_memory_map=False)
        except ValueError as error:
            yield str(error)
            continue
        yield from file_problems(opened, file, metadata)
        opened.close()


def _copy_problems(source: ShardedFiles) -> Iterator[str]:
    """Yield where ranks hold other values than ranks with the same run, or others than zeros for padding."""
    for tensor in source.metadata.tensors:
        for rank in range(source.metadata.tp_size):
            path = source.directory / source.metadata.file_of(tensor, rank).name
            if not _is_same_as_first(source, tensor, rank):
                yield f"{path}: tensor {tensor.name} differs from that of another rank, which should be the same"
            if any(padding.any() for padding in _paddings(source, tensor, rank)):
                yield f"{path}: tensor {tensor.name} has padding that is not zero"


def _is_same_as_first(source: ShardedFiles, tensor: TensorMetadata, rank: int) -> bool:
    """Whether a rank's runs are those of the first rank that holds the same."""
    tp_size = source.metadata.tp_size
    if tensor.dim is None:
        return rank == 0 or _are_same(source.local(tensor, rank), source.local(tensor, 0))
    for part, offset in tensor.spec.places():
        replicas = tp_size // part.num_shards
        first = rank - rank % replicas
        if rank != first:
            runs = (
                source.local(tensor, holder).narrow(tensor.dim, offset, part.local_size) for holder in (rank, first)
            )
            if not _are_same(*runs):
                return False
    return True


def _are_same(tensor: Tensor, other: Tensor) -> bool:
    """Whether they are, bit for bit; numbers that are none included."""
    return torch.equal(*(values.contiguous().flatten().view(torch.uint8) for values in (tensor, other)))


def _paddings(source: ShardedFiles, tensor: TensorMetadata, rank: int) -> Iterator[Tensor]:
    for part, offset in tensor.spec.places():
        assert tensor.dim is not None
        start, stop = part.bounds(rank, source.metadata.tp_size)
        used = stop - start
        if used < part.local_size:
            yield source.local(tensor, rank).narrow(tensor.dim, offset + used, part.local_size - used)


# --- a Hugging Face checkpoint ---------------------------------------------------------------------------------------


def _verify_huggingface(verdict: Verdict) -> Iterator[str]:
    paths = weight_files(verdict.directory)
    verdict.num_files = len(paths)
    verdict.num_bytes = sum(path.stat().st_size for path in paths)
    if verdict.add(_file_problems(paths)) and verdict.add(_model_problems(verdict.directory)):
        yield from _number_problems(verdict.directory)


def _file_problems(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        try:
            TensorFile(path, use_memory_map=False).close()
        except ValueError as error:
            yield str(error)


# --- both ------------------------------------------------------------------------------------------------------------


def _model_problems(directory: Path) -> Iterator[str]:
    """Yield where names, types and shapes are others than the configuration asks for."""
    with StoredModel.open(str(directory)) as model:
        yield from header_problems(model.build(1, model.source.quantization), model.source)


def _number_problems(directory: Path) -> Iterator[str]:
    """Yield where numbers are wrong: those of tied tensors, and those that the configuration's type cannot hold."""
    with StoredModel.open(str(directory)) as model:
        yield from value_problems(model.build(1, model.source.quantization), model.source)
