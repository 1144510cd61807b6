"""How ranks find out whether they can share memory, and come to share it.

Each says through the group's store where it is and what it has, and all draw the same conclusion from that. Then rank 0
makes the memory and the others map it; each says how that went, and if it went wrong for one, none uses it.
"""

import mmap
import os
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from engine.communication import segment
from engine.communication.peers import machine
from engine.communication.segment import SegmentError, SegmentPlace
from engine.communication.shared_memory import MOST_RANKS, SharedMemoryCollectives, segment_bytes
from engine.kernels.instruction_sets import usable_instruction_sets
from engine.kernels.library import KernelLibrary

T = TypeVar("T")


class CannotShareError(Exception):
    """The ranks cannot share memory: the same on all of them.

    Args:
        reason: why.
        is_unexpected: whether ranks on one machine should have been able to.
    """

    def __init__(self, reason: str, *, is_unexpected: bool) -> None:
        super().__init__(reason)
        self.is_unexpected = is_unexpected


class _Introduction(msgspec.Struct, frozen=True):
    """What a rank says of itself."""

    machine: str  # that its processes can be seen from
    pid: int
    code: str  # which of the C++ kernels
    problem: str  # why it has none


class _Made(msgspec.Struct, frozen=True):
    """The segment, or why there is none."""

    place: SegmentPlace | None
    problem: str = ""


class _Mapped(msgspec.Struct, frozen=True):
    """Why a rank could not map the segment; empty if it could."""

    problem: str = ""


def share_memory(
    store: Any,
    rank: int,
    world_size: int,
    *,
    timeout_seconds: float,
    spin_seconds: float,
    is_timed: bool,
    directory: Path,
) -> SharedMemoryCollectives:
    """Return this rank's end of the group; all ranks come here together.

    Args:
        store: that the ranks share, with nothing of this in it yet.
        rank: this process's.
        world_size: how many there are.
        timeout_seconds: how long ranks are waited for, here and in each collective.
        spin_seconds: see `SharedMemoryCollectives`.
        is_timed: likewise.
        directory: of a file system in memory.

    Raises:
        CannotShareError: on all ranks, if one cannot.
        RuntimeError: if a rank does not come, or dies meanwhile.
        ValueError: if the kernels here are of other sources; see `KernelLibrary`.
    """
    meeting = _Meeting(store, rank, world_size)
    library, problem = load_library()
    code = "" if library is None else f"{library.instruction_set} {library.source_hash}"
    ranks = meeting.exchange("here", _Introduction(machine(), os.getpid(), code, problem))
    _check_introductions(ranks)
    assert library is not None
    memory = _map_together(meeting, segment_bytes(library, world_size), directory)
    collectives = SharedMemoryCollectives(
        library,
        memory,
        rank=rank,
        pidfds=[-1 if other == rank else _process(other, ranks[other].pid) for other in range(world_size)],
        store=store,
        timeout_seconds=timeout_seconds,
        spin_seconds=spin_seconds,
        is_timed=is_timed,
    )
    collectives.barrier()  # whoever leaves may take the store along, which until here others were reading
    collectives.take_times()  # those of what is computed begin now
    return collectives


class _Meeting:
    """Exchanges words through the store."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self.rank = rank
        self._store = store
        self._world_size = world_size

    def exchange(self, name: str, word: T) -> list[T]:
        """Say a word, and return all ranks', in rank order."""
        keys = [f"{name}/{rank}" for rank in range(self._world_size)]
        self._store.set(keys[self.rank], msgspec.json.encode(word))
        try:
            contents = self._store.multi_get(keys)
        except RuntimeError as error:
            silent = [str(rank) for rank, key in enumerate(keys) if not self._store.check([key])]
            raise RuntimeError(f"rank {', '.join(silent)} does not come to share memory") from error
        return [msgspec.json.decode(content, type=type(word)) for content in contents]

    def tell(self, name: str, word: msgspec.Struct) -> None:
        """Say a word for all."""
        self._store.set(name, msgspec.json.encode(word))

    def hear(self, name: str, word_type: type[T]) -> T:
        """Return what rank 0 tells."""
        try:
            return msgspec.json.decode(self._store.get(name), type=word_type)
        except RuntimeError as error:
            raise RuntimeError("rank 0 does not come to share memory") from error


def load_library() -> tuple[KernelLibrary | None, str]:
    """Return the fastest kernels that there are, or why there are none.

    Raises:
        ValueError: if they are of other sources; see `KernelLibrary`.
    """
    usable = usable_instruction_sets()
    if not usable:
        return None, "there are no C++ kernels for this machine, which has no AVX2"
    try:
        return KernelLibrary(usable[0].name), ""
    except OSError as error:
        return None, f"there are no C++ kernels: {error}"


def _check_introductions(ranks: list[_Introduction]) -> None:
    if len(ranks) > MOST_RANKS:
        raise CannotShareError(f"{len(ranks)} ranks are more than {MOST_RANKS}", is_unexpected=True)
    if len({rank.machine for rank in ranks}) > 1:
        raise CannotShareError("they are not all on one machine, or in one container", is_unexpected=False)
    for number, rank in enumerate(ranks):
        if rank.problem:
            raise CannotShareError(f"rank {number}: {rank.problem}", is_unexpected=True)
        if rank.code != ranks[0].code:
            raise CannotShareError(f"rank {number} has other C++ kernels than rank 0", is_unexpected=True)


def _map_together(meeting: _Meeting, num_bytes: int, directory: Path) -> mmap.mmap:
    """Return the segment, mapped here as it is on all ranks."""
    if meeting.rank > 0:
        return _map_with_others(meeting, meeting.hear("segment", _Made))
    try:
        descriptor = segment.create(num_bytes, directory)
    except SegmentError as error:
        made = _Made(None, str(error))
        meeting.tell("segment", made)
        return _map_with_others(meeting, made)
    try:
        made = _Made(segment.place_of(descriptor))
        meeting.tell("segment", made)
        return _map_with_others(meeting, made)
    finally:
        os.close(descriptor)


def _map_with_others(meeting: _Meeting, made: _Made) -> mmap.mmap:
    if made.place is None:
        raise CannotShareError(made.problem, is_unexpected=True)
    memory, problem = None, ""
    try:
        memory = segment.attach(made.place)
    except SegmentError as error:
        problem = str(error)
    for rank, mapped in enumerate(meeting.exchange("mapped", _Mapped(problem))):
        if mapped.problem:
            raise CannotShareError(f"rank {rank}: {mapped.problem}", is_unexpected=True)
    assert memory is not None
    return memory


def _process(rank: int, pid: int) -> int:
    """Return a descriptor of another rank's process; -1 where the system gives none."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError as error:
        raise RuntimeError(f"rank {rank} died") from error
    except OSError:  # not permitted here: then only time tells
        return -1
