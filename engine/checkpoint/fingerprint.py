"""A short proof that ranks have loaded the same model, made without reading all of its weights."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.checkpoint.huggingface import weight_files
from engine.checkpoint.retry import read_bytes
from engine.parallel.base import iterate_sharded_parameters
from engine.protocol.model_config import ModelConfig
from engine.protocol.model_directory import METADATA_FILE, is_distributed

if TYPE_CHECKING:
    from hashlib import _Hash

LENGTH_BYTES = 8  # a safetensors file begins with its header's length, little-endian


def fingerprint(model: nn.Module, directory: Path, config: ModelConfig) -> str:
    """Return a hash that ranks share only if they run the same model from the same files, as hexadecimal SHA-256.

    It covers the configuration; the name, size and header of each weights file, or a distributed checkpoint's metadata;
    and the values of the parameters that every rank holds whole, after they were loaded. Of the other weights it covers
    no values.

    Args:
        model: the rank's loaded shard.
        directory: where it was loaded from.
        config: of the model.

    Raises:
        ValueError: naming the file, when the directory holds no weights files.
    """
    digest = hashlib.sha256()
    _add(digest, "config", json.dumps(asdict(config), sort_keys=True).encode())
    if is_distributed(directory):  # says all of its files' names, sizes and checksums
        _add(digest, METADATA_FILE, read_bytes(directory / METADATA_FILE))
    else:
        for path in weight_files(directory):
            size = path.stat().st_size
            _add(digest, f"{path.name} {size}", _read_header(path, size))
    for name, parameter, spec in iterate_sharded_parameters(model):
        if spec.dim is None:
            _add(digest, f"{name} {parameter.dtype} {list(parameter.shape)}", _bytes_of(parameter))
    return digest.hexdigest()


def _add(digest: "_Hash", label: str, content: bytes) -> None:
    """Add both with their lengths, so that no two different lists of entries look alike."""
    for entry in (label.encode(), content):
        digest.update(len(entry).to_bytes(8, "little"))
        digest.update(entry)


def _read_header(path: Path, file_size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(min(file_size, int.from_bytes(file.read(LENGTH_BYTES), "little")))


def _bytes_of(parameter: Tensor) -> bytes:
    return parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
