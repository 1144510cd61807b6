"""Distributed checkpoints, written in one process as so many ranks would write them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.checkpoint.distributor import WeightDistributor
from engine.checkpoint.huggingface import HuggingFaceFiles
from engine.checkpoint.layout import lay_out
from engine.checkpoint.metadata import CheckpointMetadata, FileMetadata, file_name
from engine.checkpoint.staging import Stager
from engine.checkpoint.targets import targets_of
from engine.checkpoint.tensor_writer import TensorFileWriter
from engine.communication.handler import CommunicationHandler
from engine.models.registry import build_model
from engine.protocol.model_config import ModelConfig
from engine.protocol.model_directory import METADATA_FILE, read_model_config

CPU = torch.device("cpu")
MakeModel = Callable[[CommunicationHandler], nn.Module]


def place(rank: int, size: int) -> CommunicationHandler:
    """Return a rank's place in a group that nobody has joined."""
    return CommunicationHandler.place(rank, size, CPU)


def shard(source: Path, directory: Path, tp_size: int, **options: Any) -> Path:
    """Write a Hugging Face directory as a distributed checkpoint of `tp_size` ranks."""
    model_config = ModelConfig.from_directory(source)

    def make(group: CommunicationHandler) -> nn.Module:
        model = build_model(model_config, group, device=CPU, dtype=getattr(torch, model_config.dtype))
        with HuggingFaceFiles(source) as files:
            WeightDistributor(group.rank, group.world_size, Stager(CPU)).fill(model, files)
        return model

    config, _ = read_model_config(source)
    return write(make, directory, tp_size, config=config, **options)


def write(
    make: MakeModel,
    directory: Path,
    tp_size: int,
    *,
    config: dict[str, Any] | None = None,
    step: int = 0,
    max_file_size: int | None = None,
) -> Path:
    """Write the models that `make` returns for each rank as a distributed checkpoint."""
    directory.mkdir(parents=True)
    tensors = lay_out(targets_of(make(place(0, tp_size))), max_file_size=max_file_size)
    count = 1 + max((tensor.file_index for tensor in tensors), default=0)
    metadata = CheckpointMetadata(model_name="test", config=config or {}, step=step).of_tensors(tensors, tp_size)
    files = []
    for rank in range(tp_size):
        values = {target.name: target.tensor.detach() for target in targets_of(make(place(rank, tp_size)))}
        for index in range(count):
            names = [tensor.name for tensor in tensors if tensor.file_index == index]
            path = directory / file_name(rank, index, count)
            places = [(name, values[name].dtype, tuple(values[name].shape)) for name in names]
            with TensorFileWriter(path, places, metadata.file_texts(rank, index)) as writer:
                for name in names:
                    writer.write(name, values[name])
            files.append(
                FileMetadata(name=path.name, rank=rank, index=index, size=writer.size, xxh3_128=writer.checksum)
            )
    metadata = replace(metadata, files=tuple(files))
    (directory / METADATA_FILE).write_bytes(metadata.to_json())
    return directory
