"""The memory behind mapped weights: brought in ahead of use, kept in, and asked how much of it is in."""

import ctypes
import errno
import functools
import logging
import mmap
import os
import resource
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from engine.checkpoint.huge_pages import ask_for_huge_pages
from engine.checkpoint.retry import WAITS

MAP_NORESERVE = 0x4000  # mmap has no name for it before Python 3.13
MADV_WILLNEED = 3
MADV_POPULATE_READ = 22  # Linux 5.14
MLOCK_ONFAULT = 1
EHWPOISON = 133  # errno has no name for it
CHUNK_BYTES = 2 << 20  # brought in at once; a few tenths of a millisecond, in which nothing else can be mapped
LOWEST_PRIORITY = 19  # nice(1)
SETTLE_SECONDS = 0.25  # from loading what is in the page cache to mapping what was not used until then
FEW_PROBES = 16  # places of each file that tell whether it is to be read
PROBES = 64  # places, of all files together, that are asked about; a question takes longer than its pages do
PROBE_PAGES = 16  # that a place has
PAGE = mmap.PAGESIZE
logger = logging.getLogger(__name__)


def map_privately(descriptor: int, size: int) -> Tensor:
    """Return an open file's bytes, `[size]` uint8, as a mapping that may be written to; the file never changes.

    Torch knows no read-only tensors; pages that nobody writes to stay the file's. So none are set aside for writing,
    which the system would refuse for a file larger than its memory.

    Raises:
        OSError, ValueError: if the file cannot be mapped.
    """
    pages = mmap.mmap(descriptor, size, mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
    content = torch.frombuffer(pages, dtype=torch.uint8)
    ask_for_huge_pages(content)
    return content


class MappedMemory:
    """Mapped files whose tensors a model uses.

    Args:
        files: path and bytes of each, `[size]` uint8.
    """

    def __init__(self, files: list[tuple[str, Tensor]]) -> None:
        self._ranges = [(path, *_pages_of(content)) for path, content in files if content.numel()]
        self._files = files  # keeps them mapped

    @property
    def num_bytes(self) -> int:
        """All of it, whether it is in memory or not."""
        return sum(length for _, _, length in self._ranges)

    def lock(self) -> None:
        """Keep each page in memory once it is there, as long as this process lives.

        Raises:
            ValueError: if the system does not let this process keep so much.
        """
        for _, address, length in self._ranges:
            # Not mlock, which would write to each page and so make a copy of it for this process alone.
            if _libc().mlock2(ctypes.c_void_p(address), ctypes.c_size_t(length), MLOCK_ONFAULT):
                raise ValueError(_lock_problem(ctypes.get_errno(), self.num_bytes))

    def prefetch(self, advance: Callable[[int], None] = lambda _: None) -> threading.Thread:
        """Bring all of it into memory, in a thread of its own that nobody has to wait for.

        It gives way to other threads, and ends with the main thread.

        Args:
            advance: is told, in that thread, of the bytes that came in.
        """
        thread = threading.Thread(target=self._bring_in, args=(advance,), name="prefetch")
        thread.start()
        return thread

    def resident_share(self) -> float:
        """Return which share of it is in memory, 1.0 of nothing; of large files an estimate from some pages."""
        if not self._ranges:
            return 1.0
        probes = share_probes([length for _, _, length in self._ranges])
        ranges = zip(self._ranges, probes, strict=True)
        resident = sum(length * _resident_share(address, length, count) for (_, address, length), count in ranges)
        return resident / self.num_bytes

    def _seems_resident(self) -> bool:
        """Whether a few pages of each file are all in the page cache already."""
        return all(_resident_share(address, length, FEW_PROBES) == 1.0 for _, address, length in self._ranges)

    def _bring_in(self, advance: Callable[[int], None]) -> None:
        # Where all processors are busy, what they compute brings the pages in itself, and this would only hold it up.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        if self._seems_resident():  # nothing is to be read: mapping it can wait for what a start computes first
            threading.main_thread().join(SETTLE_SECONDS)
        for path, address, length in self._ranges:
            for offset in range(0, length, CHUNK_BYTES):
                # Not a daemon thread: those are cut off while Python ends, at times in a way that aborts the process.
                if not threading.main_thread().is_alive():
                    return
                size = min(CHUNK_BYTES, length - offset)
                if not _populate(address + offset, size):
                    logger.error("%s: cannot be read at byte %d: what uses these weights will end", path, offset)
                    return
                advance(size)


def _pages_of(content: Tensor) -> tuple[int, int]:
    """Return address and length of the pages that a mapped file lies in."""
    address = content.data_ptr()
    start = address // PAGE * PAGE
    return start, -(-(address + content.numel() - start) // PAGE) * PAGE


def _populate(address: int, length: int) -> bool:
    """Read pages into memory and map them; return whether that was possible."""
    for wait in (*WAITS, 0.0):
        code = _madvise(address, length, MADV_POPULATE_READ)
        if code == errno.EINVAL:  # an older kernel: have them read, at least
            code = _madvise(address, length, MADV_WILLNEED)
        if code not in (errno.EFAULT, EHWPOISON, errno.EAGAIN):
            return True
        time.sleep(wait)
    return False


def share_probes(lengths: list[int]) -> list[int]:
    """Return how many places to ask about in each of some ranges of so many bytes, by their size; one in each at least.

    They are asked about while the service runs: many files must not take more time than one.
    """
    total = sum(lengths)
    return [min(length // PAGE, max(1, PROBES * length // total)) for length in lengths]


def _resident_share(address: int, length: int, count: int) -> float:
    pages = length // PAGE
    asked = min(PROBE_PAGES, pages)
    vector = (ctypes.c_ubyte * asked)()
    found = 0
    for index in range(count):
        page = address + (pages - asked) * index // max(1, count - 1) * PAGE
        if _libc().mincore(ctypes.c_void_p(page), ctypes.c_size_t(asked * PAGE), vector) == 0:
            found += sum(flags & 1 for flags in vector)
    return found / (count * asked)


def _madvise(address: int, length: int, advice: int) -> int:
    """Return 0 or the error number. mmap's own method would hold the interpreter's lock while it reads."""
    failed = _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice)
    return ctypes.get_errno() if failed else 0


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _lock_problem(code: int, wanted: int) -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    allowed = "" if limit == resource.RLIM_INFINITY else f"; ulimit -l allows {limit} bytes"
    return f"--mlock: {wanted} bytes of weights cannot be kept in memory: {os.strerror(code)}{allowed}"
