"""Timed collectives among the ranks of one group."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.communication.base import Collectives, CollectiveTimes
from engine.communication.timing import CudaTimer, HostRunTimer, RunTimer
from engine.communication.torch_collectives import TorchCollectives


class CommunicationHandler:
    """One rank's end of a group. Alone, without other ranks, each collective returns its input at once.

    All ranks of the group call the same collectives in the same order, with tensors of equal shape and dtype.

    Args:
        device: where this rank computes.
        ranks: the group: torch's, or what `ProcessGroupManager` has found to be the fastest. None: there is one rank.
        is_timed: whether collectives of torch's group are timed and counted.

    Raises:
        RuntimeError: (any collective) when another rank is gone, or does not come within the group's time-out.
    """

    def __init__(
        self, device: torch.device, ranks: dist.ProcessGroup | Collectives | None = None, *, is_timed: bool = True
    ) -> None:
        self.device = device
        if isinstance(ranks, dist.ProcessGroup):
            ranks = TorchCollectives(device, ranks, is_timed=is_timed)
        self._collectives = ranks
        self.rank = 0 if self._collectives is None else self._collectives.rank
        self.world_size = 1 if self._collectives is None else self._collectives.world_size

    @property
    def store(self) -> Any:
        """What the ranks share beside collectives: texts by key. None where there is one rank."""
        return None if self._collectives is None else self._collectives.store

    @property
    def carrier(self) -> str:
        """What carries the bytes: "shared-memory", "gloo" or "nccl"; "none" where there is one rank."""
        return "none" if self._collectives is None else self._collectives.name

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum the contiguous `tensor` over the ranks, in place, and return it."""
        if self._collectives is not None:
            self._collectives.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """Return every rank's tensor, concatenated along `dim` in rank order."""
        return tensor if self._collectives is None else self._collectives.all_gather(tensor, dim)

    def gather(self, tensor: Tensor, dim: int = -1) -> Tensor | None:
        """Return every rank's tensor concatenated along `dim` on rank 0, and None on the others."""
        return tensor if self._collectives is None else self._collectives.gather(tensor, dim)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite the contiguous `tensor` with that of rank `source`, and return it."""
        if self._collectives is not None:
            self._collectives.broadcast(tensor, source)
        return tensor

    def reduce_scatter(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Sum `tensor` over the ranks and return this rank's of `world_size` equal runs along `dim`.

        Raises:
            ValueError: when the dimension is no multiple of the number of ranks.
        """
        if self._collectives is None:
            return tensor
        self._check_split(tensor, dim)
        return self._collectives.reduce_scatter(tensor, dim)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self._collectives is not None:
            self._collectives.barrier()

    def split(self, tensor: Tensor, dim: int) -> tuple[Tensor, ...]:
        """Return `world_size` equal views of `tensor` along `dim`: rank r's is the r-th.

        Raises:
            ValueError: when the dimension is no multiple of the number of ranks.
        """
        self._check_split(tensor, dim)
        return tensor.tensor_split(self.world_size, dim)

    def _check_split(self, tensor: Tensor, dim: int) -> None:
        size = tensor.shape[dim]
        if size % self.world_size:
            raise ValueError(f"dimension {dim} of size {size} cannot be split evenly over {self.world_size} ranks")

    @classmethod
    def place(cls, rank: int, world_size: int, device: torch.device) -> "CommunicationHandler":
        """Return a rank's place in a group that nobody has joined, for layers that are laid out and never computed."""
        group = cls(device)
        group.rank, group.world_size = rank, world_size
        return group

    def take_times(self) -> CollectiveTimes:
        """Return the collectives' times since the last take."""
        return CollectiveTimes({}, {}, {}) if self._collectives is None else self._collectives.take_times()

    def run_timer(self) -> RunTimer:
        """Return what tells computing from communicating in this rank's runs, where collectives are timed."""
        if self._collectives is not None:
            return self._collectives.run_timer()
        return CudaTimer() if self.device.type == "cuda" else HostRunTimer(lambda: 0.0)

    def close(self) -> None:
        """Leave the group; the other ranks' open collectives then fail. May be called twice."""
        if self._collectives is not None:
            self._collectives.close()
