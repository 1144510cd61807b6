"""The contract between a rank's handler and whatever carries bytes between the ranks."""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from engine.communication.timing import RunTimer
from engine.protocol.messages import HistogramDelta


class CollectiveTimes(NamedTuple):
    """What was counted since the last take, by operation, as `/metrics` adds it up; histograms are of seconds."""

    whole: dict[str, HistogramDelta]
    waiting: dict[str, HistogramDelta]  # of these, for slower ranks; none where that is not known
    num_bytes: dict[str, int]  # of all calls; see `call_bytes`


def call_bytes(operation: str, num_bytes: int, world_size: int) -> int:
    """Return the bytes of a call of which each rank's part has `num_bytes`, as nccl-tests counts them."""
    is_of_all = operation in ("all_gather", "gather", "reduce_scatter")
    return num_bytes * world_size if is_of_all else num_bytes


class Collectives(Protocol):
    """Several ranks, of which this process is one. See `engine.communication.handler` for what the operations do.

    Raises:
        RuntimeError: (any collective) when another rank is gone, or does not come within the group's time-out.
    """

    name: str  # of what carries the bytes: "gloo", "nccl", "shared-memory"
    rank: int
    world_size: int

    @property
    def store(self) -> Any:
        """Return what the ranks share beside collectives: texts by key."""
        ...

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a contiguous tensor over the ranks, in place."""
        ...

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """Return every rank's tensor, concatenated along `dim` in rank order."""
        ...

    def gather(self, tensor: Tensor, dim: int) -> Tensor | None:
        """Return the same on rank 0, and None on the others."""
        ...

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite a contiguous tensor with that of rank `source`."""
        ...

    def reduce_scatter(self, tensor: Tensor, dim: int) -> Tensor:
        """Sum a tensor over the ranks and return this rank's of `world_size` equal runs along `dim`."""
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...

    def take_times(self) -> CollectiveTimes:
        """Return the collectives' times since the last take; none where they are not timed."""
        ...

    def run_timer(self) -> RunTimer:
        """Return what tells computing from communicating in this rank's runs."""
        ...

    def close(self) -> None:
        """Leave the group; the other ranks' open collectives then fail."""
        ...
