"""Memory that the ranks of one machine share.

It is a file in /dev/shm that never has a name: rank 0 makes it, and the others open it through rank 0's descriptor. So
nothing can be left of it, whenever which rank is killed.
"""

import errno
import mmap
import os
from pathlib import Path

import msgspec

from engine.protocol.units import format_bytes

SHARED_MEMORY = Path("/dev/shm")


class SegmentError(RuntimeError):
    """Ranks cannot have memory in common; the message says why, and what helps."""


class SegmentPlace(msgspec.Struct, frozen=True):
    """Where a segment is found by another process that may see the one that made it."""

    pid: int
    descriptor: int
    identity: tuple[int, int]  # device and inode
    num_bytes: int


def create(num_bytes: int, directory: Path = SHARED_MEMORY) -> int:
    """Return a descriptor of a new segment, all zero, of which every byte is there.

    Args:
        num_bytes: its size.
        directory: of a file system in memory.

    Raises:
        SegmentError: if there is no such file system, or no room in it.
    """
    descriptor = -1
    try:
        descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
        os.posix_fallocate(descriptor, 0, num_bytes)  # now, not by SIGBUS when it is first written
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        if error.errno == errno.ENOSPC:
            raise SegmentError(_no_room(num_bytes, directory)) from error
        raise SegmentError(f"{directory} gives no memory: {error.strerror}") from error
    return descriptor


def _no_room(num_bytes: int, directory: Path) -> str:
    state = os.statvfs(directory)
    free, size = state.f_bavail * state.f_frsize, state.f_blocks * state.f_frsize
    return (
        f"{directory} has {format_bytes(free)} of {format_bytes(size)} left, and the ranks need "
        f"{format_bytes(num_bytes)} of it: make it larger (docker run --shm-size, or on Kubernetes an emptyDir of "
        "medium Memory)"
    )


def place_of(descriptor: int) -> SegmentPlace:
    """Return where others find a segment of this process, for as long as the descriptor is open."""
    state = os.fstat(descriptor)
    return SegmentPlace(os.getpid(), descriptor, (state.st_dev, state.st_ino), state.st_size)


def attach(place: SegmentPlace) -> mmap.mmap:
    """Map another process's segment into this one.

    Raises:
        SegmentError: if it cannot be had.
    """
    try:
        descriptor = os.open(f"/proc/{place.pid}/fd/{place.descriptor}", os.O_RDWR)
    except OSError as error:
        raise SegmentError(f"the memory of process {place.pid} cannot be shared: {error.strerror}") from error
    try:
        if place_of(descriptor).identity != place.identity:
            raise SegmentError(f"the memory of process {place.pid} is not there any more")
        return map_segment(descriptor, place.num_bytes)
    finally:
        os.close(descriptor)


def map_segment(descriptor: int, num_bytes: int) -> mmap.mmap:
    """Map a segment, with its pages: the first collectives are no slower than others.

    Raises:
        SegmentError: if there is no room among the process's addresses.
    """
    try:
        return mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    except OSError as error:
        raise SegmentError(f"shared memory cannot be mapped: {error.strerror}") from error
