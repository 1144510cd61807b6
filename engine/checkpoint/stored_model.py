"""A model as a checkpoint on the disk holds it, to be read a tensor at a time."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from engine.checkpoint.distributor import WeightDistributor, refuse_quantized
from engine.checkpoint.problems import header_problems
from engine.checkpoint.source import TensorSource
from engine.checkpoint.sources import open_source
from engine.checkpoint.staging import Stager
from engine.checkpoint.targets import Target, targets_of
from engine.checkpoint.tensor_header import TORCH_DTYPES
from engine.communication.handler import CommunicationHandler
from engine.models.llama import LlamaForCausalLM
from engine.models.registry import build_model
from engine.protocol.model_config import ModelConfig
from engine.protocol.model_directory import find_model_directory, read_model_config

META = torch.device("meta")


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint of either form, opened, and the model that its configuration describes."""

    directory: Path
    raw_config: dict[str, Any]  # as config.json has it
    config: ModelConfig
    source: TensorSource

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: str) -> Iterator[Self]:
        """Give the model of a directory, or of the latest step in it; its files are closed after the block.

        Raises:
            ValueError: naming the file that is missing or cannot be used.
        """
        directory = find_model_directory(path)
        raw_config, origin = read_model_config(directory)
        config = ModelConfig.from_object(raw_config, origin)
        with open_source(directory) as source:
            yield cls(directory, raw_config, config, source)

    def targets(self, tp_size: int, dtype: torch.dtype | None = None, quantization: str = "none") -> list[Target]:
        """Return the tensors of each of `tp_size` ranks, without memory behind them.

        They are of type `dtype`, or as they are stored; parts of one tensor that are stored in several types have the
        smallest that holds all their values. Matrices are as `--quantization` has them.

        Raises:
            ValueError: if the model cannot be split so, or naming the file and the tensor, if it could not be served.
        """
        self.config.check_tensor_parallel_size(tp_size)
        for problem in header_problems(self.build(1, self.source.quantization), self.source):
            raise ValueError(problem)
        refuse_quantized(self.directory, self.source.quantization, quantization)
        return [self._retyped(target, dtype) for target in targets_of(self.build(tp_size, quantization))]

    def read(self, target: Target, tp_rank: int, tp_size: int) -> Target:
        """Return one of `targets` with a rank's values in it, padding included.

        Raises:
            ValueError: naming the file and the tensor that cannot be read, or that overflows in this type.
        """
        filled = replace(target, tensor=torch.empty_like(target.tensor, device="cpu"))
        WeightDistributor(tp_rank, tp_size, Stager(filled.tensor.device)).fill_target(filled, self.source)
        return filled

    def build(self, tp_size: int, quantization: str) -> LlamaForCausalLM:
        """Return one of `tp_size` ranks' model, without memory behind it."""
        dtype = getattr(torch, self.config.dtype)
        group = CommunicationHandler.place(0, tp_size, META)
        return build_model(self.config, group, device=META, dtype=dtype, quantization=quantization)

    def _retyped(self, target: Target, dtype: torch.dtype | None) -> Target:
        if target.is_scale or not target.tensor.is_floating_point():
            return target
        return replace(target, tensor=target.tensor.detach().to(dtype or self._stored_dtype(target)))

    def _stored_dtype(self, target: Target) -> torch.dtype:
        names = (self.source.present(piece.sources)[0] for piece in target.pieces(0, 1))
        return functools.reduce(torch.promote_types, (TORCH_DTYPES[self.source.dtype_of(name)] for name in names))
