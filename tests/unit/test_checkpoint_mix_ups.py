"""Files that are whole, fit, and belong elsewhere."""

from pathlib import Path

import pytest

from engine.checkpoint.convert import shard
from engine.checkpoint.metadata import CheckpointMetadata
from engine.checkpoint.sharded import ShardedFiles
from engine.protocol.commands import ShardCommand
from engine.protocol.config import EMBEDDED_MODEL


def sharded(directory: Path, name: str = "model") -> Path:
    command = ShardCommand(
        source=str(EMBEDDED_MODEL), destination=str(directory), tensor_parallel_size=2, model_name=name
    )
    shard(command, lambda _total: lambda _count: None)
    return directory


def error_of(directory: Path) -> str:
    with ShardedFiles(directory, CheckpointMetadata.read(directory)) as source, pytest.raises(ValueError) as error:  # noqa: PT011
        source.open_all()
    return str(error.value)


def test_files_of_two_ranks_that_were_swapped_are_found_without_reading_them(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "model")
    first, second = (directory / f"weights_rank{rank}.safetensors" for rank in range(2))
    assert first.stat().st_size == second.stat().st_size
    first.rename(directory / "other")
    second.rename(first)
    (directory / "other").rename(second)
    assert error_of(directory) == f"{first}: is file 0 of rank 1, but metadata.json says file 0 of rank 0"


def test_a_file_of_another_checkpoint_of_the_same_shapes_is_found(tmp_path: Path) -> None:
    directory, other = sharded(tmp_path / "model"), sharded(tmp_path / "other", "neighbour")
    path = directory / "weights_rank1.safetensors"
    size = path.stat().st_size
    (other / path.name).rename(path)
    assert path.stat().st_size == size
    assert error_of(directory) == f"{path}: is of another checkpoint than metadata.json"


def test_editing_name_step_or_configuration_leaves_the_files_its_own(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "model")
    path = directory / "metadata.json"
    path.write_text(
        path.read_text().replace('"step": 0', '"step": 7').replace('"model_name": "model"', '"model_name": "x"')
    )
    metadata = CheckpointMetadata.read(directory)
    assert (metadata.step, metadata.model_name) == (7, "x")
    with ShardedFiles(directory, metadata) as source:
        assert len(source.open_all()) == 2
