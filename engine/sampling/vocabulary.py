"""What every pass over logits of a whole vocabulary needs: how many rows it takes at once, and the largest of each."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Elements that one pass over the vocabulary handles: as many as stay in a core's cache, or keep an accelerator busy.
CPU_PASS_SIZE = 1 << 18
DEVICE_PASS_SIZE = 1 << 22


def rows_per_pass(logits: Tensor) -> int:
    """Return how many rows of `logits` one pass handles."""
    size = CPU_PASS_SIZE if logits.device.type == "cpu" else DEVICE_PASS_SIZE
    return max(1, size // logits.shape[1])


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut `items` into runs of `size`; the last may be shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


def to_index(values: Sequence[int], device: torch.device) -> Tensor:
    """Return `values` as int64."""
    return torch.tensor(values, dtype=torch.int64).to(device)


def largest(scores: Tensor, width: int) -> Tensor:
    """Return the ids of the `width` largest scores of each row in falling order, the lower id first among equals.

    Tokens are ranked by integers that hold the score's order above and the id below: no two are equal, so any algorithm
    on any device ranks them alike.
    """
    if width == 0:  # nothing to rank: saves half of what a log-probability without the likeliest tokens costs
        return torch.empty((scores.shape[0], 0), dtype=torch.int64, device=scores.device)
    bits = (scores + 0.0).view(torch.int32)  # adding 0.0 turns -0.0 into 0.0
    order = bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)  # integers in the order of the floats
    descending_ids = torch.arange(scores.shape[1] - 1, -1, -1, device=scores.device)
    keys = order.to(torch.int64).mul_(1 << 32).bitwise_or_(descending_ids)
    ranked = keys.topk(width, dim=1).values if width < scores.shape[1] else keys.sort(dim=1, descending=True).values
    return (scores.shape[1] - 1) - ranked.bitwise_and_(0xFFFFFFFF)
