"""Huge pages for weights: every step reads them from end to end, and looking up small pages costs a part of that."""

import ctypes
import functools
import mmap

from torch import Tensor

HUGE_PAGE = 2 << 20


def ask_for_huge_pages(memory: Tensor) -> None:
    """Ask the system to hold a tensor in huge pages as its memory is first touched. It may do otherwise."""
    start = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = memory.data_ptr() + memory.nbytes - start
    if memory.device.type == "cpu" and length >= HUGE_PAGE:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
