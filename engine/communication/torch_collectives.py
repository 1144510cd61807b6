"""Collectives of torch's process groups: gloo among CPUs of several machines, NCCL among CUDA devices."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.communication.base import CollectiveTimes, call_bytes
from engine.communication.timing import CudaTimer, HostTimer, NoTimer, RunTimer, Timer


class TorchCollectives:
    """See `engine.communication.base.Collectives`.

    Args:
        device: where this rank computes.
        process_group: torch's.
        is_timed: whether operations are timed and counted.
    """

    def __init__(self, device: torch.device, process_group: dist.ProcessGroup, *, is_timed: bool = True) -> None:
        self.name = process_group.name()
        self.rank = process_group.rank()
        self.world_size = process_group.size()
        self._group = process_group
        self._timer: Timer = _timer(device) if is_timed else NoTimer()

    @property
    def store(self) -> Any:
        """Return the process group's store."""
        return self._group.get_group_store()

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over the ranks; see `Collectives`."""
        self._measure("all_reduce", tensor.nbytes, lambda: dist.all_reduce(tensor, group=self._group))

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """Return every rank's tensor, concatenated; see `Collectives`."""
        source = tensor.contiguous()
        parts = list(source.new_empty((self.world_size, *source.shape)).unbind())
        self._measure("all_gather", source.nbytes, lambda: dist.all_gather(parts, source, group=self._group))
        return torch.cat(parts, dim)

    def gather(self, tensor: Tensor, dim: int) -> Tensor | None:
        """Return the same on rank 0 alone; see `Collectives`."""
        source = tensor.contiguous()
        parts = list(source.new_empty((self.world_size, *source.shape)).unbind()) if self.rank == 0 else None
        self._measure("gather", source.nbytes, lambda: dist.gather(source, parts, group=self._group, group_dst=0))
        return None if parts is None else torch.cat(parts, dim)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite with rank `source`'s; see `Collectives`."""
        self._measure("broadcast", tensor.nbytes, lambda: dist.broadcast(tensor, group=self._group, group_src=source))

    def reduce_scatter(self, tensor: Tensor, dim: int) -> Tensor:
        """Return this rank's run of the sum; see `Collectives`."""
        runs = [run.contiguous() for run in tensor.tensor_split(self.world_size, dim)]
        out = torch.empty_like(runs[self.rank])
        self._measure("reduce_scatter", out.nbytes, lambda: dist.reduce_scatter(out, runs, group=self._group))
        return out

    def barrier(self) -> None:
        """Wait for every rank."""
        self._measure("barrier", 0, lambda: dist.barrier(group=self._group))

    def take_times(self) -> CollectiveTimes:
        """Return the times since the last take; how much of them was waiting nobody knows."""
        times, num_bytes = self._timer.take()
        return CollectiveTimes(times, {}, num_bytes)

    def run_timer(self) -> RunTimer:
        """Return what tells computing from communicating."""
        return self._timer.run_timer()

    def close(self) -> None:
        """Leave the group, if that is not done."""
        if dist.is_initialized():
            dist.destroy_process_group(self._group)

    def _measure(self, operation: str, num_bytes: int, collective: Callable[[], object]) -> None:
        """Do what each rank's part of has `num_bytes`."""
        self._timer.measure(operation, call_bytes(operation, num_bytes, self.world_size), collective)


def _timer(device: torch.device) -> Timer:
    return CudaTimer() if device.type == "cuda" else HostTimer()
