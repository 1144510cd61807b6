"""Loading a checkpoint that is replaced or removed meanwhile: all of the old one, or an error, never some of each."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.checkpoint.loader import ModelLoadConfig
from engine.checkpoint.metadata import CheckpointMetadata
from engine.checkpoint.meter import Progress
from engine.checkpoint.model_distributor import ModelDistributor
from engine.checkpoint.saver import CheckpointSaver
from engine.communication.handler import CommunicationHandler
from engine.protocol.model_directory import METADATA_FILE, step_directory
from tests.sharded_checkpoints import CPU

STEP = 7
ALONE = CommunicationHandler(CPU)


def make(value: float) -> nn.Module:
    model = nn.Linear(64, 64)
    for parameter in model.parameters():
        parameter.data.fill_(value)
    return model


def save(parent: Path, value: float, max_file_size: int | None) -> None:
    metadata = CheckpointMetadata(model_name="test")
    CheckpointSaver(parent, ALONE, max_file_size=max_file_size).save_checkpoint(make(value), metadata, STEP)


def load(parent: Path, progress: Progress, **options: Any) -> nn.Module:
    model, config = make(0.0), ModelLoadConfig(checkpoint_dir="", tp_size=1, **options)
    ModelDistributor(ALONE, config, progress).load_model(model, parent)
    return model


@pytest.mark.parametrize("use_memory_map", [True, False])
def test_a_checkpoint_that_is_replaced_between_two_of_its_files_is_refused(
    tmp_path: Path, use_memory_map: bool
) -> None:
    """The new one looks like the old: nothing but what metadata.json says of checksums is different."""
    save(tmp_path, 1.0, max_file_size=1)

    def replace(done: int, _: int) -> None:
        if done == 64 * 64 * 4:  # of the first file
            save(tmp_path, 2.0, max_file_size=1)

    path = step_directory(tmp_path, STEP) / METADATA_FILE
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: was replaced by another checkpoint's while"):
        load(tmp_path, replace, use_memory_map=use_memory_map)
    model = load(tmp_path, lambda _done, _total: None)
    assert all(torch.equal(parameter, torch.full_like(parameter, 2.0)) for parameter in model.parameters())


@pytest.mark.parametrize("use_memory_map", [True, False])
def test_a_checkpoint_that_is_removed_once_its_files_are_open_is_loaded(tmp_path: Path, use_memory_map: bool) -> None:
    save(tmp_path, 1.0, max_file_size=None)
    removals: list[int] = []

    def remove(done: int, _: int) -> None:
        if not removals:
            shutil.rmtree(step_directory(tmp_path, STEP))
            removals.append(done)

    model = load(tmp_path, remove, use_memory_map=use_memory_map)
    assert removals
    assert all(torch.equal(parameter, torch.ones_like(parameter)) for parameter in model.parameters())


def test_a_checkpoint_that_is_removed_before_all_of_its_files_are_open_names_the_one_that_is_missing(
    tmp_path: Path,
) -> None:
    save(tmp_path, 1.0, max_file_size=1)

    def remove(done: int, _: int) -> None:
        if done == 64 * 64 * 4:
            shutil.rmtree(step_directory(tmp_path, STEP))

    with pytest.raises(ValueError, match=r"weights_rank0-00002-of-00002\.safetensors: is missing"):
        load(tmp_path, remove)
