"""Collectives of torch's process groups: gloo among CPUs of several machines, NCCL among CUDA devices."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.communication.base import CollectiveTimes
from engine.communication.timing import CudaTimer, HostTimer, Timer


class TorchCollectives:
    """See `engine.communication.base.Collectives`."""

    def __init__(self, device: torch.device, process_group: dist.ProcessGroup) -> None:
        self.name = process_group.name()
        self.rank = process_group.rank()
        self.world_size = process_group.size()
        self._group = process_group
        self._timer: Timer = CudaTimer() if device.type == "cuda" else HostTimer()

    @property
    def store(self) -> Any:
        """Return the process group's store."""
        return self._group.get_group_store()

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over the ranks; see `Collectives`."""
        self._timer.measure("all_reduce", lambda: dist.all_reduce(tensor, group=self._group))

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """Return every rank's tensor, concatenated; see `Collectives`."""
        source = tensor.contiguous()
        parts = list(source.new_empty((self.world_size, *source.shape)).unbind())
        self._timer.measure("all_gather", lambda: dist.all_gather(parts, source, group=self._group))
        return torch.cat(parts, dim)

    def gather(self, tensor: Tensor, dim: int) -> Tensor | None:
        """Return the same on rank 0 alone; see `Collectives`."""
        source = tensor.contiguous()
        parts = list(source.new_empty((self.world_size, *source.shape)).unbind()) if self.rank == 0 else None
        self._timer.measure("gather", lambda: dist.gather(source, parts, group=self._group, group_dst=0))
        return None if parts is None else torch.cat(parts, dim)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite with rank `source`'s; see `Collectives`."""
        self._timer.measure("broadcast", lambda: dist.broadcast(tensor, group=self._group, group_src=source))

    def reduce_scatter(self, tensor: Tensor, dim: int) -> Tensor:
        """Return this rank's run of the sum; see `Collectives`."""
        runs = [run.contiguous() for run in tensor.tensor_split(self.world_size, dim)]
        out = torch.empty_like(runs[self.rank])
        self._timer.measure("reduce_scatter", lambda: dist.reduce_scatter(out, runs, group=self._group))
        return out

    def barrier(self) -> None:
        """Wait for every rank."""
        self._timer.measure("barrier", lambda: dist.barrier(group=self._group))

    def take_times(self) -> CollectiveTimes:
        """Return the times since the last take; how much of them was waiting nobody knows."""
        return CollectiveTimes(self._timer.take_deltas(), {})

    def close(self) -> None:
        """Leave the group, if that is not done."""
        if dist.is_initialized():
            dist.destroy_process_group(self._group)
