"""Options of loading that contradict each other, or cannot be followed, are told of."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.checkpoint.loader import ModelLoadConfig
from engine.checkpoint.model_distributor import ModelDistributor
from tests.sharded_checkpoints import CPU, place, write


def warnings_of(directory: Path, caplog: pytest.LogCaptureFixture, **options: Any) -> list[str]:
    config = ModelLoadConfig(checkpoint_dir="", tp_size=1, **options)
    with caplog.at_level(logging.WARNING):
        ModelDistributor(place(0, 1), config).load_model(nn.Linear(50, 50, device=CPU), directory)
    return caplog.messages


def test_locked_memory_is_read_ahead_and_that_is_said_where_prefetching_is_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = write(lambda _: nn.Linear(50, 50), tmp_path / "checkpoint", 1)
    said = [f"{directory}: what is locked is read ahead, although prefetching is off"]
    assert warnings_of(directory, caplog, lock_memory=True, enable_prefetch=False) == said


@pytest.mark.parametrize("verify_checksums", [True, False])
@pytest.mark.parametrize("enable_prefetch", [True, False])
@pytest.mark.parametrize("use_memory_map", [True, False])
def test_nothing_is_said_of_options_that_are_followed(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    use_memory_map: bool,
    enable_prefetch: bool,
    verify_checksums: bool,
) -> None:
    directory = write(lambda _: nn.Linear(50, 50), tmp_path / "checkpoint", 1)
    options = {"use_memory_map": use_memory_map, "enable_prefetch": enable_prefetch}
    assert warnings_of(directory, caplog, verify_checksums=verify_checksums, **options) == []


def test_weights_on_a_device_are_told_of_as_not_locked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, device: str
) -> None:
    if device != "cuda":
        pytest.skip("needs --device cuda")
    directory = write(lambda _: nn.Linear(50, 50), tmp_path / "checkpoint", 1)
    config = ModelLoadConfig(checkpoint_dir="", tp_size=1, lock_memory=True)
    group = place(0, 1)
    group.device = torch.device(device)
    ModelDistributor(group, config).load_model(nn.Linear(50, 50, device=device), directory)
    assert f"{directory}: 10.0 KiB are copied, not mapped: memory is not locked" in caplog.messages


@pytest.mark.parametrize("form", ["distributed", "Hugging Face"])
def test_a_size_that_is_not_the_groups_is_refused_whatever_is_loaded(tmp_path: Path, form: str) -> None:
    directory = write(lambda _: nn.Linear(5, 5), tmp_path / "checkpoint", 1)
    if form == "Hugging Face":
        (directory / "metadata.json").unlink()
        (directory / "weights_rank0.safetensors").rename(directory / "model.safetensors")
        (directory / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="tp_size is 2, but the group has 1 ranks"):
        ModelDistributor(place(0, 1), ModelLoadConfig(checkpoint_dir="", tp_size=2)).load_model(
            nn.Linear(5, 5), directory
        )
