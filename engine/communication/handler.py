"""Timed collectives among the ranks of one group."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.communication.timing import CudaTimer, HostTimer, Timer
from engine.protocol.messages import HistogramDelta


class CommunicationHandler:
    """One rank's end of a group. Without a process group it is alone, and each collective returns its input at once.

    All ranks of the group call the same collectives in the same order, with tensors of equal shape and dtype.

    Raises:
        RuntimeError: (any collective) when another rank is gone, or does not come within the group's time-out.
    """

    def __init__(self, device: torch.device, process_group: dist.ProcessGroup | None = None) -> None:
        self.device = device
        self.rank = 0 if process_group is None else process_group.rank()
        self.world_size = 1 if process_group is None else process_group.size()
        self._group = process_group
        self._timer: Timer = CudaTimer() if device.type == "cuda" else HostTimer()

    @property
    def store(self) -> Any:
        """What the ranks share beside collectives: texts by key. None where there is one rank."""
        return None if self._group is None else self._group.get_group_store()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum the contiguous `tensor` over the ranks, in place, and return it."""
        if self.world_size > 1:
            self._timer.measure("all_reduce", lambda: dist.all_reduce(tensor, group=self._group))
        return tensor

    def all_gather(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """Return every rank's tensor, concatenated along `dim` in rank order."""
        if self.world_size == 1:
            return tensor
        source = tensor.contiguous()
        parts = list(source.new_empty((self.world_size, *source.shape)).unbind())
        self._timer.measure("all_gather", lambda: dist.all_gather(parts, source, group=self._group))
        return torch.cat(parts, dim)

    def gather(self, tensor: Tensor, dim: int = -1) -> Tensor | None:
        """Return every rank's tensor concatenated along `dim` on rank 0, and None on the others."""
        if self.world_size == 1:
            return tensor
        source = tensor.contiguous()
        parts = list(source.new_empty((self.world_size, *source.shape)).unbind()) if self.rank == 0 else None
        self._timer.measure("gather", lambda: dist.gather(source, parts, group=self._group, group_dst=0))
        return None if parts is None else torch.cat(parts, dim)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite the contiguous `tensor` with that of rank `source`, and return it."""
        if self.world_size > 1:
            self._timer.measure("broadcast", lambda: dist.broadcast(tensor, group=self._group, group_src=source))
        return tensor

    def reduce_scatter(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Sum `tensor` over the ranks and return this rank's of `world_size` equal runs along `dim`.

        Raises:
            ValueError: when the dimension is no multiple of the number of ranks.
        """
        if self.world_size == 1:
            return tensor
        runs = [run.contiguous() for run in self.split(tensor, dim)]
        out = torch.empty_like(runs[self.rank])
        self._timer.measure("reduce_scatter", lambda: dist.reduce_scatter(out, runs, group=self._group))
        return out

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            self._timer.measure("barrier", lambda: dist.barrier(group=self._group))

    def split(self, tensor: Tensor, dim: int) -> tuple[Tensor, ...]:
        """Return `world_size` equal views of `tensor` along `dim`: rank r's is the r-th.

        Raises:
            ValueError: when the dimension is no multiple of the number of ranks.
        """
        size = tensor.shape[dim]
        if size % self.world_size:
            raise ValueError(f"dimension {dim} of size {size} cannot be split evenly over {self.world_size} ranks")
        return tensor.tensor_split(self.world_size, dim)

    @classmethod
    def place(cls, rank: int, world_size: int, device: torch.device) -> "CommunicationHandler":
        """Return a rank's place in a group that nobody has joined, for layers that are laid out and never computed."""
        group = cls(device)
        group.rank, group.world_size = rank, world_size
        return group

    def take_deltas(self) -> dict[str, HistogramDelta]:
        """Return the collectives' times in seconds since the last take, by operation, as `/metrics` adds them up."""
        return self._timer.take_deltas()
