"""The plainest way to bring a file's bytes into a process: map it, and read all of it once."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.mapped_memory import map_privately

WORD = 8  # bytes added up at once


def touch(tensors: Iterable[Tensor]) -> int:
    """Read every byte of contiguous tensors once, in order, and return what they add up to as 64-bit words."""
    return sum(_touch(tensor.detach().flatten().view(torch.uint8)) for tensor in tensors if tensor.numel())


def map_file(path: Path) -> Tensor:
    """Return a file's bytes, `[size]` uint8, as a mapping of them."""
    with path.open("rb") as file:
        return map_privately(file.fileno(), os.fstat(file.fileno()).st_size)


def _touch(content: Tensor) -> int:
    """Add up bytes: whole words from the first that is aligned, and what is before and behind them one by one."""
    head = min(-content.data_ptr() % WORD, len(content))
    tail = (len(content) - head) % WORD
    words = content[head : len(content) - tail].view(torch.int64)
    return int(words.sum()) + int(content[:head].sum()) + int(content[len(content) - tail :].sum())
