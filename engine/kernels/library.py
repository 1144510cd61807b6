"""Loads the C++ kernels, and says what their functions take."""

import ctypes
import logging
import os
import struct
from collections.abc import Callable
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

from engine.kernels.instruction_sets import usable_instruction_sets
from engine.kernels.sources import DIRECTORY, headers_in, library_name, source_hash, sources_in

logger = logging.getLogger(__name__)

POINTER, SIZE = c_void_p, c_int64  # a tensor's data_ptr() or a pool; a count
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "pool_destroy": (POINTER,),
    "collectives_segment_bytes": (c_int, SIZE),
    "collectives_create": (POINTER, c_int, c_int, *[SIZE] * 4, POINTER, POINTER, c_int, c_int),
    "collectives_destroy": (POINTER,),
    "collectives_failure": (POINTER, POINTER),
    "collectives_spent_ns": (POINTER,),
    "collectives_take_times": (POINTER, POINTER),
    "all_reduce": (POINTER, POINTER, SIZE, c_int),
    "all_gather": (*[POINTER] * 3, *[SIZE] * 2),
    "gather": (*[POINTER] * 3, *[SIZE] * 2),
    "broadcast": (POINTER, POINTER, SIZE, c_int),
    "reduce_scatter": (*[POINTER] * 3, *[SIZE] * 2, c_int),
    "barrier": (POINTER,),
    "linear_f32": (*[POINTER] * 5, *[SIZE] * 3),
    "linear_bf16": (*[POINTER] * 5, *[SIZE] * 3),
    "linear_bf16_f32": (*[POINTER] * 5, *[SIZE] * 3),
    "linear_int8_f32": (*[POINTER] * 6, *[SIZE] * 4),
    "linear_int8_bf16": (*[POINTER] * 6, *[SIZE] * 4),
    "linear_int8_bf16_f32": (*[POINTER] * 6, *[SIZE] * 4),
    "int8_scales_f32": (*[POINTER] * 3, *[SIZE] * 3),
    "int8_scales_bf16": (*[POINTER] * 3, *[SIZE] * 3),
    "int8_rows_f32": (*[POINTER] * 4, *[SIZE] * 3),
    "int8_rows_bf16": (*[POINTER] * 4, *[SIZE] * 3),
    "add_rms_norm_f32": (*[POINTER] * 6, *[SIZE] * 2, c_float),
    "add_rms_norm_bf16": (*[POINTER] * 6, *[SIZE] * 2, c_float),
    "paged_attention_f32": (*[POINTER] * 8,),
    "paged_attention_bf16": (*[POINTER] * 8,),
    "silu_mul_f32": (*[POINTER] * 3, *[SIZE] * 2),
    "silu_mul_bf16": (*[POINTER] * 3, *[SIZE] * 2),
    "sample": (*[POINTER] * 3, SIZE, POINTER, *[SIZE] * 2),
    "read_memory": (*[POINTER] * 3, SIZE),
}
RESULTS: dict[str, Any] = {  # None for the others
    "collectives_segment_bytes": SIZE,
    "collectives_create": POINTER,
    "collectives_spent_ns": POINTER,
    **dict.fromkeys(("all_reduce", "all_gather", "gather", "broadcast", "reduce_scatter", "barrier"), c_int),
}


class KernelLibrary:
    """The kernels as one instruction set has them.

    Raises:
        OSError: if there is no such library, or it cannot be loaded.
        ValueError: if it was compiled from other sources than those beside it, whose functions may take something else.
    """

    def __init__(self, instruction_set: str, directory: Path = DIRECTORY) -> None:
        self.instruction_set = instruction_set
        path = directory / library_name(instruction_set)
        _check_whole(path)
        self._library = ctypes.CDLL(str(path))
        sources = (*sources_in(directory), *headers_in(directory))
        if sources and self.source_hash != source_hash(sources):  # a third of a millisecond
            raise ValueError(
                f"{path} was compiled from other sources than those beside it: run `make install`, or "
                "`python -m engine.kernels.build`"
            )

    @property
    def source_hash(self) -> str:
        """Of the sources that it was compiled from; see `engine.kernels.sources`."""
        function = self._library.ryz_source_hash
        function.restype = c_char_p
        text: bytes = function()
        return text.decode()

    def function(self, name: str) -> Callable[..., Any]:
        """Return the function `ryz_{name}`, which checks nothing: neither sizes nor pointers. It releases the GIL."""
        function: Any = self._library[f"ryz_{name}"]  # an object of its own each time, unlike an attribute
        function.argtypes, function.restype = SIGNATURES[name], RESULTS.get(name)
        typed: Callable[..., Any] = function
        return typed

    def create_pool(self, num_threads: int, cpus: list[int] | None, spin_seconds: float) -> int:
        """Return a pool of threads for the functions that take one; it is never destroyed.

        Args:
            num_threads: the calling thread included.
            cpus: which core each stays on; None leaves that to the kernel.
            spin_seconds: how long a thread without work looks for some before it sleeps.

        Raises:
            RuntimeError: if the threads cannot be had.
        """
        function = self._library.ryz_pool_create
        function.argtypes, function.restype = (c_int, c_void_p, c_int64), c_void_p
        array = None if cpus is None else (c_int * num_threads)(*cpus)
        pool: int | None = function(num_threads, array, round(spin_seconds * 1e9))
        if pool is None:
            raise RuntimeError(f"{num_threads} threads cannot be started")
        return pool


def find_library(instruction_set: str = "auto", directory: Path = DIRECTORY) -> KernelLibrary | None:
    """Return the kernels for an instruction set; for `auto` the fastest that there are, or None, with one warning.

    Args:
        instruction_set: `auto`, or the name of one of `engine.kernels.instruction_sets`.
        directory: where the libraries are.

    Raises:
        ValueError: naming the option, if another than `auto` cannot be had; for any, if a library is of other sources:
            no property of the machine, as a missing compiler is, but half of an update, which one command ends, and
            which a service at a fraction of its speed would hide.
    """
    if instruction_set == "auto":
        try:
            return fastest_library(directory)
        except OSError as error:
            logger.warning("there are no C++ kernels, so torch computes, slower: %s", error)
            return None
    usable = [item.name for item in usable_instruction_sets()]
    if instruction_set not in usable:
        raise ValueError(f"--kernels {instruction_set}: this machine has {', '.join(usable) or 'none of them'}")
    try:
        return KernelLibrary(instruction_set, directory)
    except OSError as error:
        raise ValueError(f"--kernels {instruction_set}: {error}") from error


def fastest_library(directory: Path = DIRECTORY) -> KernelLibrary:
    """Return the kernels for the fastest instruction set that this machine has.

    Raises:
        OSError: if it has none, or they cannot be loaded.
        ValueError: if they are of other sources.
    """
    usable = usable_instruction_sets()
    if not usable:
        raise OSError("this is no x86-64 with AVX2")
    return KernelLibrary(usable[0].name, directory)


def _check_whole(path: Path) -> None:
    """Raise OSError if a library is cut short: the loader would map it, and the process would die of what is missing.

    A linker writes the table of sections last (ELF-64: its offset is at 40 of the header, entry size and count at 58).
    """
    with path.open("rb") as file:
        header, size = file.read(64), os.fstat(file.fileno()).st_size
    if len(header) < 64 or not header.startswith(b"\x7fELF"):
        raise OSError(f"{path} is no library")
    (offset,), (entry_size, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    if offset + entry_size * count > size:
        raise OSError(f"{path} is cut short")
