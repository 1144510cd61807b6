"""`python -m engine.bench.random_checkpoint 1b DIRECTORY`: a model of a well-known shape whose weights are drawn.

It loads and computes as the real one does, and says nothing of sense. The same seed gives the same bytes.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.bench.shapes import raw_configs
from engine.checkpoint.destination import TEXT_FILES
from engine.checkpoint.huggingface import SINGLE_FILE
from engine.checkpoint.targets import targets_of
from engine.checkpoint.tensor_writer import TensorFileWriter
from engine.communication.handler import CommunicationHandler
from engine.models.registry import build_model
from engine.protocol.errors import EXIT_USER_ERROR
from engine.protocol.model_config import ModelConfig
from engine.protocol.model_directory import CONFIG_FILE


def write_random_checkpoint(
    directory: Path, config: dict[str, Any], *, seed: int = 0, tokenizer: Path | None = None
) -> None:
    """Write a Hugging Face directory. Of the weights no more than one tensor is in memory.

    Args:
        directory: must not be there yet.
        config: what its `config.json` will hold.
        seed: of the weights.
        tokenizer: directory of a model whose tokenizer is copied.

    Raises:
        ValueError: naming the directory or file that cannot be written, or the field that cannot be used.
    """
    model = ModelConfig.from_object(config, CONFIG_FILE)
    try:
        directory.mkdir(parents=True)
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        _copy_tokenizer(tokenizer, directory)
        _write_weights(directory / SINGLE_FILE, model, seed)
    except FileExistsError as error:
        raise ValueError(f"{directory}: is there already") from error
    except OSError as error:
        raise ValueError(f"{error.filename or directory}: {error.strerror}") from error


def _copy_tokenizer(source: Path | None, directory: Path) -> None:
    for path in [source / name for name in TEXT_FILES] if source else []:
        if path.is_file():
            shutil.copyfile(path, directory / path.name)


def _write_weights(path: Path, config: ModelConfig, seed: int) -> None:
    dtype: torch.dtype = getattr(torch, config.dtype)
    shapes = _stored_shapes(config, dtype)
    generator = torch.Generator().manual_seed(seed)
    with TensorFileWriter(path, [(name, dtype, shape) for name, shape in shapes.items()], alignment=1) as writer:
        for name, shape in shapes.items():
            writer.write(name, _draw(shape, dtype, generator))


def _stored_shapes(config: ModelConfig, dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that a checkpoint has, in the order of the layers."""
    meta = torch.device("meta")
    model = build_model(config, CommunicationHandler(meta), device=meta, dtype=dtype)
    pieces = [piece for target in targets_of(model) for piece in target.pieces(0, 1)]
    return {piece.sources[0]: piece.wanted.global_shape for piece in pieces}


def _draw(shape: Iterable[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Draw matrices that keep a vector's length, and vectors of norms and biases near 1."""
    *rows, columns = shape
    tensor = torch.empty((*rows, columns), dtype=dtype)
    if rows:
        return tensor.normal_(0.0, 1 / math.sqrt(columns), generator=generator)
    return tensor.normal_(1.0, 0.05, generator=generator)


def main(arguments: list[str]) -> int:
    """Write what the command line asks for, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m engine.bench.random_checkpoint", description=__doc__)
    parser.add_argument("shape", choices=list(raw_configs()))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="directory of a model whose tokenizer is copied")
    chosen = parser.parse_args(arguments)
    try:
        config = raw_configs()[chosen.shape]
        write_random_checkpoint(chosen.directory, config, seed=chosen.seed, tokenizer=chosen.tokenizer)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
