"""Collectives among CPU ranks on one machine, through memory that they share: see engine/kernels/cpu/collectives.cpp.

Sums are taken in float32 at least, in rank order, and rounded once, so all ranks have the same bits. All ranks must
call the same operation with the same type and size: if they do not, that is noticed, and is the error of all.
"""

import ctypes
import math
import mmap
import os
from collections.abc import Sequence
from ctypes import c_int, c_int64, c_uint32, c_uint64
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.communication.base import CollectiveTimes, call_bytes
from engine.communication.timing import HostRunTimer
from engine.kernels.library import KernelLibrary
from engine.protocol.messages import HistogramDelta
from engine.protocol.stats import OPERATIONS, TIME_BUCKETS

MOST_RANKS = 64
SLOT_BYTES = 256 << 10  # what a rank shares at a time; a multiple of 64 for each of 64 ranks
MOST_SUMMED_BY_ALL = 32 << 10  # bytes of an all-reduce which every rank sums as a whole

HISTOGRAM_LENGTH = len(TIME_BUCKETS) + 2  # counts, of which the last is that without a bound, and the sum

# As collectives.cpp numbers them; it has the operations in the order of OPERATIONS.
SUMMED_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.int64: 4}
MISSING, DIED, LEFT = 1, 2, 3


class SharedMemoryCollectives:
    """See `engine.communication.base.Collectives`.

    Args:
        library: the C++ kernels, the same on all ranks.
        segment: `segment_bytes` of memory which all ranks have mapped; closed with the group.
        rank: this process's.
        pidfds: a descriptor of each rank's process, or -1 where its death cannot be seen, and for this one; closed with
            the group.
        store: what the ranks share beside.
        timeout_seconds: how long a rank is waited for.
        spin_seconds: how long a rank that waits looks for the others before it sleeps.
        is_timed: whether operations are timed and counted.

    Raises:
        RuntimeError: if there is no memory for this end.
    """

    name = "shared-memory"

    def __init__(
        self,
        library: KernelLibrary,
        segment: mmap.mmap,
        *,
        rank: int,
        pidfds: Sequence[int],
        store: Any,
        timeout_seconds: float,
        spin_seconds: float,
        is_timed: bool = True,
    ) -> None:
        self.rank = rank
        self.world_size = len(pidfds)
        self.store = store
        self._segment = segment
        self._pidfds = pidfds
        # Bound once: a collective of one token takes a microsecond.
        self._all_reduce = library.function("all_reduce")
        self._all_gather = library.function("all_gather")
        self._gather = library.function("gather")
        self._broadcast = library.function("broadcast")
        self._reduce_scatter = library.function("reduce_scatter")
        self._barrier = library.function("barrier")
        self._library = library
        self._end: int | None = library.function("collectives_create")(
            ctypes.addressof(ctypes.c_char.from_buffer(segment)),
            rank,
            self.world_size,
            SLOT_BYTES,
            MOST_SUMMED_BY_ALL,
            round(spin_seconds * 1e9),
            round(timeout_seconds * 1e9),
            (c_int * self.world_size)(*pidfds),
            (c_int64 * len(TIME_BUCKETS))(*(round(bound * 1e9) for bound in TIME_BUCKETS)),
            len(TIME_BUCKETS),
            is_timed,
        )
        if self._end is None:
            raise RuntimeError(f"rank {rank} has no memory left for its end of the group")
        self._spent_ns = c_int64.from_address(library.function("collectives_spent_ns")(self._end))
        self._times = np.zeros((len(OPERATIONS), 2 * HISTOGRAM_LENGTH + 1), dtype=np.int64)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over the ranks; see `Collectives`."""
        assert tensor.is_contiguous()
        if self._all_reduce(self._end, tensor.data_ptr(), tensor.numel(), _summed_type(tensor)):
            raise self._error()

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """Return every rank's tensor, concatenated; see `Collectives`."""
        source = tensor.contiguous()
        out, rows = self._room_for_all(source, dim)
        if self._all_gather(self._end, out.data_ptr(), source.data_ptr(), rows, source.nbytes // rows):
            raise self._error()
        return out

    def gather(self, tensor: Tensor, dim: int) -> Tensor | None:
        """Return the same on rank 0 alone; see `Collectives`."""
        source = tensor.contiguous()
        out, rows = self._room_for_all(source, dim) if self.rank == 0 else (None, 1)
        place = None if out is None else out.data_ptr()
        if self._gather(self._end, place, source.data_ptr(), rows, source.nbytes // rows):
            raise self._error()
        return out

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite with rank `source`'s; see `Collectives`."""
        assert tensor.is_contiguous()
        if self._broadcast(self._end, tensor.data_ptr(), tensor.nbytes, source):
            raise self._error()

    def reduce_scatter(self, tensor: Tensor, dim: int) -> Tensor:
        """Return this rank's run of the sum; see `Collectives`."""
        source = tensor.contiguous()
        dim %= source.dim()
        shape = list(source.shape)
        shape[dim] //= self.world_size
        out = source.new_empty(shape)
        rows = math.prod(shape[:dim]) or 1
        run = out.numel() // rows
        if self._reduce_scatter(self._end, out.data_ptr(), source.data_ptr(), rows, run, _summed_type(source)):
            raise self._error()
        return out

    def barrier(self) -> None:
        """Wait for every rank."""
        if self._barrier(self._end):
            raise self._error()

    def take_times(self) -> CollectiveTimes:
        """Return what was counted since the last take; nothing for a rank that has left."""
        times = CollectiveTimes({}, {}, {})
        if self._end is None:
            return times
        self._library.function("collectives_take_times")(self._end, self._times.ctypes.data)
        for operation, (*whole_and_waiting, num_bytes) in zip(OPERATIONS, self._times.tolist(), strict=True):
            whole, waiting = whole_and_waiting[:HISTOGRAM_LENGTH], whole_and_waiting[HISTOGRAM_LENGTH:]
            if any(whole[:-1]):
                times.whole[operation] = _delta(whole)
                times.waiting[operation] = _delta(waiting)
                times.num_bytes[operation] = call_bytes(operation, num_bytes, self.world_size)
        return times

    def run_timer(self) -> HostRunTimer:
        """Return what tells computing from communicating."""
        return HostRunTimer(self._seconds_spent)

    def _seconds_spent(self) -> float:
        return 0.0 if self._end is None else self._spent_ns.value / 1e9

    def close(self) -> None:
        """Leave the group; the other ranks' open collectives then fail. May be called twice."""
        if self._end is None:
            return
        self._library.function("collectives_destroy")(self._end)
        self._end = None
        self._segment.close()
        for descriptor in self._pidfds:
            if descriptor >= 0:
                os.close(descriptor)

    def _room_for_all(self, source: Tensor, dim: int) -> tuple[Tensor, int]:
        """Return a tensor for every rank's along `dim`, and how many runs of memory each rank has in it."""
        dim %= source.dim()
        shape = list(source.shape)
        rows = math.prod(shape[:dim]) or 1
        shape[dim] *= self.world_size
        return source.new_empty(shape), rows

    def _error(self) -> RuntimeError:
        """Return why the group cannot go on."""
        if self._end is None:
            return RuntimeError("this rank has left the group")
        failure = _Failure()
        self._library.function("collectives_failure")(self._end, ctypes.byref(failure))
        text = _describe(failure)
        return RuntimeError(text if failure.reporter == self.rank else f"{text} (as rank {failure.reporter} found)")


class _Failure(ctypes.Structure):
    """`FailureReport` of collectives_group.h."""

    _fields_ = (
        ("kind", c_uint32),
        ("reporter", c_uint32),
        ("ranks", c_uint64),
        ("tag", c_uint64),
        ("other_tag", c_uint64),
        ("waited_ns", c_int64),
    )


def segment_bytes(library: KernelLibrary, world_size: int) -> int:
    """Return the bytes of memory that so many ranks share."""
    num_bytes: int = library.function("collectives_segment_bytes")(world_size, SLOT_BYTES)
    return num_bytes


def _summed_type(tensor: Tensor) -> int:
    number = SUMMED_TYPES.get(tensor.dtype)
    if number is None:
        raise ValueError(f"ranks on one machine cannot sum {tensor.dtype}")
    return number


def _delta(numbers: list[int]) -> HistogramDelta:
    return HistogramDelta(numbers[:-1], numbers[-1] / 1e9)


def _describe(failure: _Failure) -> str:
    ranks = [rank for rank in range(MOST_RANKS) if failure.ranks >> rank & 1]
    who = f"rank {', '.join(map(str, ranks))}"
    call = _describe_call(failure.tag)
    if failure.kind == MISSING:
        return f"{who} has not come to {call} within {failure.waited_ns / 1e9:.3g} s"
    if failure.kind == DIED:
        return f"{who} died before it came to {call}"
    if failure.kind == LEFT:
        return f"{who} has left the group, and others wait for it in {call}"
    return f"ranks do not do the same: rank {failure.reporter} calls {call}, {who} {_describe_call(failure.other_tag)}"


def _describe_call(tag: int) -> str:
    """Say what a rank wants: `tag_of` of collectives.cpp, the other way round."""
    operation = OPERATIONS[(tag >> 56) - 1]
    if operation == "barrier":
        return operation
    names = [f" of {str(dtype).removeprefix('torch.')}" for dtype in SUMMED_TYPES]
    of_type = names[index] if (index := tag >> 48 & 0xFF) < len(names) else ""
    source = f" from rank {tag >> 40 & 0xFF}" if operation == "broadcast" else ""
    return f"{operation}{source} ({tag & (1 << 40) - 1} bytes{of_type})"
