"""Everything that is wrong with a checkpoint, told without loading it."""

from collections.abc import Iterator

import torch
from torch import nn

from engine.checkpoint.distributor import float16_problem, overflows, tie_problem
from engine.checkpoint.source import TensorSource
from engine.checkpoint.targets import Piece, targets_of


def header_problems(model: nn.Module, source: TensorSource) -> Iterator[str]:
    """Yield each reason why `model` could not be filled from `source`, as the files' headers show them.

    Args:
        model: whole, as one rank holds it; on any device, `meta` included. Its parameters are left alone.
        source: a checkpoint.
    """
    targets = targets_of(model)
    yield from source.extras({name for target in targets for name in target.all_sources()})
    for piece in _whole_pieces(model):
        for name in source.present(piece.sources):
            if problem := source.problem_of(name, piece.wanted.global_shape, piece.run.dtype):
                yield problem


def value_problems(model: nn.Module, source: TensorSource) -> Iterator[str]:
    """Yield each reason why `model` could not be filled with the numbers in `source`, whose headers are as they should.

    Only tensors whose numbers can be wrong are read, one at a time: those that float16 may not hold, and those that
    config.json ties into one.

    Args:
        model: see `header_problems`; of the dtype that the weights would be loaded in.
        source: a checkpoint.
    """
    for piece in _whole_pieces(model):
        first, *others = source.present(piece.sources)
        narrows = piece.run.dtype == torch.float16 and source.dtype_of(first) != "F16"
        if not narrows and not others:
            continue
        values = source.read(first, piece.wanted, piece.run.dtype)
        if narrows and overflows(values.half(), values):
            yield float16_problem(source, first)
        for other in others:
            if not torch.equal(values, source.read(other, piece.wanted, piece.run.dtype)):
                yield tie_problem(source, first, other)


def _whole_pieces(model: nn.Module) -> Iterator[Piece]:
    return (piece for target in targets_of(model) for piece in target.pieces(0, 1))
