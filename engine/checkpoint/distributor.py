"""Brings the slices of a checkpoint's tensors to the ranks whose layers declare them."""

from pathlib import Path

import torch
from torch import Tensor, nn

from engine.checkpoint.huge_pages import ask_for_huge_pages
from engine.checkpoint.source import TensorSource
from engine.checkpoint.staging import Stager, chunks
from engine.checkpoint.targets import Piece, Target, TensorSlice, name_of_matrix, targets_of
from engine.kernels.base import Kernels


class WeightDistributor:
    """Fills one rank's model from a checkpoint of any form, cut in any way.

    What to read follows from each layer's `ShardSpec`: the rank's run of rows (row parallel), of columns or biases
    (column parallel), of a vocabulary, of heads, one after the other where parts are fused, and the same as its
    neighbours' where there are fewer KV heads than ranks. A tensor that the model has no place for is an error: it was
    trained to be part of the result.

    Args:
        tp_rank: the rank whose slices are read.
        tp_size: how many ranks the model is split over.
        stager: copies them.
    """

    def __init__(self, tp_rank: int, tp_size: int, stager: Stager) -> None:
        self._tp_rank = tp_rank
        self._tp_size = tp_size
        self._stager = stager

    def fill(self, model: nn.Module, source: TensorSource) -> None:
        """Fill every tensor of `model` in place, converted to its type, and its padding with zeros.

        Raises:
            ValueError: naming the file and the tensor, when `source` does not hold exactly this model.
        """
        targets = targets_of(model)
        refuse_extras(targets, source)
        try:
            for target in targets:
                self.fill_target(target, source)
        finally:
            self._stager.finish()  # copies on their way would land in memory that a failure has given back

    def fill_target(self, target: Target, source: TensorSource) -> None:
        """Fill one tensor."""
        ask_for_huge_pages(target.tensor)
        for piece in target.pieces(self._tp_rank, self._tp_size):
            if target.quantizer is None or source.quantization == "int8":
                self._copy(piece, source)
            elif target.is_scale:
                self._compute_scales(piece, target.quantizer, source)
            else:
                self._quantize(piece, target.quantizer, source)
            self._stager.clear(piece.padding)

    def _copy(self, piece: Piece, source: TensorSource) -> None:
        """Copy the first of the piece's sources; where there are others too, these must be the same."""
        first, *others = source.present(piece.sources)
        values = source.read(first, piece.wanted, piece.run.dtype)
        if values.numel():
            self._stager.copy(piece.run, values)
        if narrows(piece.run, values):
            self._stager.finish()  # what is on its way cannot be looked at
        if overflows(piece.run, values):
            raise ValueError(float16_problem(source, first))
        _refuse_unequal(values, source, (first, others), piece.wanted)

    def _quantize(self, piece: Piece, quantizer: Kernels, source: TensorSource) -> None:
        """Fill with the rows of a matrix, rounded to int8, by the scales of whole rows: of all ranks' columns."""
        wanted = piece.wanted
        if wanted.is_empty:
            return
        first, *others = source.present(piece.sources)
        rows = source.read(first, wanted if wanted.dim == 0 else TensorSlice(wanted.global_shape), torch.float32)
        columns = slice(None) if wanted.dim == 0 else slice(wanted.start, wanted.stop)
        for run, values in chunks(piece.run, rows):
            self._stager.copy(run, quantizer.int8_rows(values[:, columns], quantizer.int8_scales(values)))
        _refuse_unequal(rows[:, columns], source, (first, others), wanted)

    def _compute_scales(self, piece: Piece, quantizer: Kernels, source: TensorSource) -> None:
        """Fill with the scales of a matrix' rows."""
        first = source.present([name_of_matrix(name) for name in piece.sources])[0]
        if piece.wanted.is_empty or first not in source:  # then the matrix' own target tells
            return
        shape, wanted = source.shape_of(first), piece.wanted
        rows = source.read_slice(first, TensorSlice(shape, wanted.dim, wanted.start, wanted.stop))  # for a second time
        for run, values in chunks(piece.run, rows):
            self._stager.copy(run, quantizer.int8_scales(values))


def refuse_quantized(directory: Path, stored: str, wanted: str) -> None:
    """Raise ValueError if a checkpoint's matrices have a quantization that is not wanted, and cannot be undone."""
    if stored not in ("none", wanted):
        raise ValueError(
            f"{directory}: its matrices are {stored}, which only serve, doctor, bench decode and checkpoint shard "
            f"read, with --quantization {stored}"
        )


def refuse_extras(targets: list[Target], source: TensorSource) -> None:
    """Raise ValueError, naming file and tensor, if `source` has a tensor that is none of the model's."""
    for problem in source.extras({name for target in targets for name in target.all_sources()}):
        raise ValueError(problem)


def _refuse_unequal(values: Tensor, source: TensorSource, names: tuple[str, list[str]], wanted: TensorSlice) -> None:
    """Raise ValueError if others than the first of a tensor's names have other values."""
    first, others = names
    for other in others:
        if not torch.equal(values, source.read(other, wanted, values.dtype)):
            raise ValueError(tie_problem(source, first, other))


def narrows(run: Tensor, values: Tensor) -> bool:
    """Whether `run` may not hold numbers of the type that `values` are of."""
    return run.dtype == torch.float16 and values.dtype != torch.float16


def overflows(run: Tensor, values: Tensor) -> bool:
    """Whether `values`, now in `run`, had some that float16 cannot hold."""
    return narrows(run, values) and not bool(run.isfinite().all())


def float16_problem(source: TensorSource, name: str) -> str:
    """Return the error of a tensor that overflows."""
    return (
        f"{source.path_of(name)}: tensor {source.stored_name(name)} has values that float16 cannot hold; "
        "use another --dtype"
    )


def tie_problem(source: TensorSource, first: str, other: str) -> str:
    """Return the error of two tensors that should be one."""
    names = source.stored_name(other), source.stored_name(first)
    return (
        f"{source.path_of(other)}: tensor {names[0]} differs from {names[1]}, although config.json ties them into one"
    )
