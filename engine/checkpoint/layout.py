"""Which tensor goes into which of a rank's files."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from engine.checkpoint.metadata import TensorMetadata
from engine.checkpoint.targets import Target
from engine.checkpoint.tensor_header import ALIGNMENT, DTYPE_NAMES


def lay_out(
    targets: Iterable[Target], *, max_file_size: int | None = None, dtype: torch.dtype | None = None
) -> tuple[TensorMetadata, ...]:
    """Return what the metadata says of a model's tensors.

    Args:
        targets: the model's; on any device, `meta` included.
        max_file_size: most bytes of tensors in one file, where none alone is larger; None puts all into one.
        dtype: what floating-point tensors are stored as, if not as they are.
    """
    tensors, index, size = [], 0, 0
    for target in targets:
        tensor = _describe(target, dtype)
        needed = tensor.local_bytes + ALIGNMENT
        if max_file_size is not None and size and size + needed > max_file_size:
            index, size = index + 1, 0
        size += needed
        tensors.append(replace(tensor, file_index=index))
    return tuple(tensors)


def _describe(target: Target, dtype: torch.dtype | None) -> TensorMetadata:
    stored = dtype if dtype is not None and target.tensor.is_floating_point() else target.tensor.dtype
    return TensorMetadata(
        name=target.name,
        dtype=DTYPE_NAMES[stored],
        shape=target.global_shape,
        dim=target.spec.dim,
        parts=target.spec.parts,
    )
