"""Which tensor goes into which of a rank's files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from engine.checkpoint.metadata import NO_CHECKPOINT, TensorMetadata, file_texts
from engine.checkpoint.targets import Target
from engine.checkpoint.tensor_header import ALIGNMENT, DTYPE_NAMES, TORCH_DTYPES
from engine.checkpoint.tensor_writer import file_size
from engine.protocol.model_config import MOST_RANKS

LONGEST_TEXTS = file_texts(NO_CHECKPOINT, MOST_RANKS, MOST_RANKS, 99999)
Place = tuple[str, torch.dtype, tuple[int, ...]]  # name, type and shape of a tensor in a file


def lay_out(
    targets: Iterable[Target], *, max_file_size: int | None = None, dtype: torch.dtype | None = None
) -> tuple[TensorMetadata, ...]:
    """Return what the metadata says of a model's tensors.

    Args:
        targets: the model's; on any device, `meta` included.
        max_file_size: most bytes of one file, where no tensor alone takes more; None puts all into one.
        dtype: what floating-point tensors are stored as, if not as they are.
    """
    tensors = [_describe(target, dtype) for target in targets]
    if max_file_size is None:
        return tuple(tensors)
    places = [(tensor.name, TORCH_DTYPES[tensor.dtype], tensor.local_shape) for tensor in tensors]
    files = fill_files([[place] for place in places], max_file_size, texts=LONGEST_TEXTS)
    indices = [index for index, count in enumerate(files) for _ in range(count)]
    return tuple(replace(tensor, file_index=index) for tensor, index in zip(tensors, indices, strict=True))


def fill_files(
    groups: Sequence[Sequence[Place]],
    max_file_size: int,
    alignment: int = ALIGNMENT,
    texts: Mapping[str, str] | None = None,
) -> list[int]:
    """Return how many of `groups`, in order, go into each file.

    Args:
        groups: name, type and shape of tensors that must not be parted.
        max_file_size: most bytes of one file, where no group alone takes more.
        alignment: see `TensorFileWriter`.
        texts: for the header of each.
    """
    counts, in_file = [0], list[Place]()
    for group in groups:
        in_file += group
        if counts[-1] and file_size(in_file, alignment, texts) > max_file_size:
            counts.append(0)
            in_file = list(group)
        counts[-1] += 1
    return counts


def _is_convertible(target: Target) -> bool:
    return target.tensor.is_floating_point() and not target.is_scale


def _describe(target: Target, dtype: torch.dtype | None) -> TensorMetadata:
    stored = dtype if dtype is not None and _is_convertible(target) else target.tensor.dtype
    return TensorMetadata(
        name=target.name,
        dtype=DTYPE_NAMES[stored],
        shape=target.global_shape,
        dim=target.spec.dim,
        parts=target.spec.parts,
    )
