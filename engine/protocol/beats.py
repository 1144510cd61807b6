"""How far the ranks of one epoch have come: a file in the folder of sockets, which the orchestrator and all ranks map.

    a line of 64 bytes for each rank   when it last got further with its work, in ns of CLOCK_MONOTONIC; 0: it has none
    from the next page on              the length of what follows, and as MessagePack the ids of the requests in the
                                       step that rank 0 has begun and not applied; length 0: there is no such step

Each rank writes its own line. What it wrote is there after its death, however it died.
"""

import contextlib
import mmap
import os
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

LINE_BYTES = 64  # of a processor's cache: ranks do not wait for each other's writes
STEP_BYTES = 16 << 10  # at first: some 400 request ids of 36 characters
_WORDS_IN_LINE = LINE_BYTES // 8
_LENGTH = struct.Struct("q")


class Beats:
    """The orchestrator's end. It makes the file, with room for it on the disk, and removes it.

    Raises:
        OSError: if there is no such room.
    """

    def __init__(self, path: Path, num_ranks: int) -> None:
        self._step_at = _step_offset(num_ranks)
        self._make(path)

    def _make(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, self._step_at + STEP_BYTES)  # now, not by SIGBUS in a step
            self._lines = memoryview(mmap.mmap(descriptor, self._step_at)).cast("q")
        except OSError:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        self._path, self._descriptor = path, descriptor

    def last(self, rank: int) -> int:
        """Return when a rank last got further, in nanoseconds; 0 if it has nothing to do."""
        return int(self._lines[rank * _WORDS_IN_LINE])

    def step(self) -> list[str]:
        """Return the ids of the requests in the step that was begun and not applied. To be asked of dead ranks."""
        content = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, self._step_at)
        length = _LENGTH.unpack_from(content)[0]
        if length > 0:
            with contextlib.suppress(msgspec.DecodeError):  # a rank that ran wild may have written anything
                return msgspec.msgpack.decode(content[_LENGTH.size : _LENGTH.size + length], type=list[str])
        return []

    def pass_on(self, path: Path) -> None:
        """Be the file of the next epoch's ranks, once those of this are dead: a full disk has room for that too."""
        try:
            self._path = self._path.rename(path)
        except FileNotFoundError:  # what cleans /tmp up has found it
            before = self._descriptor
            self._make(path)
            os.close(before)
        self._lines[:] = memoryview(bytes(self._step_at)).cast("q")
        os.pwrite(self._descriptor, bytes(_LENGTH.size), self._step_at)

    def close(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


class RankBeats:
    """A rank's end.

    Args:
        path: of the file.
        rank: whose line to write.
        num_ranks: how many there are.
    """

    def __init__(self, path: Path, rank: int, num_ranks: int) -> None:
        self._step_at = _step_offset(num_ranks)
        self._word = rank * _WORDS_IN_LINE
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._lines = memoryview(mmap.mmap(self._descriptor, self._step_at)).cast("q")
        self._step = mmap.mmap(self._descriptor, STEP_BYTES, offset=self._step_at)

    def beat(self) -> None:
        """Say that this rank has work, and got further with it."""
        self._lines[self._word] = time.monotonic_ns()

    def rest(self) -> None:
        """Say that it has nothing to do: it may wait for as long as it likes."""
        self._lines[self._word] = 0

    def begin_step(self, request_ids: Sequence[str]) -> None:
        """Say which requests are in the step that begins."""
        payload = msgspec.msgpack.encode(request_ids)
        end = _LENGTH.size + len(payload)
        if end > len(self._step):
            os.posix_fallocate(self._descriptor, self._step_at, end)
            self._step.resize(end)
        self._step[_LENGTH.size : end] = payload
        _LENGTH.pack_into(self._step, 0, len(payload))  # last: what a length is written for is whole
        self.beat()

    def end_step(self) -> None:
        """Say that what the step computed is applied."""
        _LENGTH.pack_into(self._step, 0, 0)


def _step_offset(num_ranks: int) -> int:
    return -(-num_ranks * LINE_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
