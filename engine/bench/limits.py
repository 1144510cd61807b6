"""What this machine allows: how fast its cores read memory, and multiply matrices."""

import ctypes
import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.bench.figures import Figure
from engine.bench.limits_report import READ, Limit, LimitsBenchmark
from engine.kernels.cpu_kernels import DTYPES, CPUKernels
from engine.kernels.library import KernelLibrary, find_library
from engine.protocol.commands import BenchLimitsCommand
from engine.worker import host

CHUNK_BYTES = 4 << 20  # that the read loop takes at once; see engine/kernels/cpu/limits.cpp
SMALLEST_BUFFER = 1 << 30
CACHES_IN_BUFFER = 8  # so many times the last cache is "much larger" than it
GEMM_SHAPE = (512, 4096, 4096)  # tokens, in features, out features: as long prompts have it
FLOAT16_TOKENS = 32  # in their place: torch is ten times slower in float16, and no faster with more
GEMM_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
SPIN_SECONDS = 100e-6
HOPELESS = 0.5  # of the best rate; below it a way to multiply is not tried again
CACHES = Path("/sys/devices/system/cpu")


@dataclass
class Way:
    """One way to do a thing on some cores."""

    name: str
    cores: int
    amount: int  # bytes or operations of one run
    run: Callable[[], object]

    def rate(self) -> float:
        """Do it once and return the amount a second."""
        torch.set_num_threads(self.cores)
        began = time.perf_counter()
        self.run()
        return self.amount / (time.perf_counter() - began)


class LimitMeter:
    """Measures reading and multiplying on some numbers of cores, again and again, each in the best way that it knows.

    Args:
        cores: the numbers of cores.
        dtypes: that matrices are multiplied in, names of `GEMM_DTYPES`.
    """

    def __init__(self, cores: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        self.library = find_library()
        pools = {count: _pool(self.library, count) for count in cores}
        buffer = _buffer()
        self._readers = {count: _reader(self.library, pools[count], count, buffer) for count in cores}
        self._multipliers = {
            (dtype, count): _best_of(_multipliers(self.library, pools[count], count, dtype))
            for dtype in dtypes
            for count in cores
        }

    def reader(self, cores: int) -> Way:
        """Return what reads memory on so many cores."""
        return self._readers[cores]

    def multiplier(self, dtype: str, cores: int) -> Way:
        """Return the fastest that multiplies matrices of a type on so many cores."""
        return self._multipliers[dtype, cores]


def measure_limits(command: BenchLimitsCommand) -> LimitsBenchmark:
    """Measure everything on 1, 2, 4 … and all cores, in turns."""
    cores = core_counts(host.num_cpus())
    dtypes = ("float32", "bfloat16", "int8")
    meter = LimitMeter(cores, dtypes)
    ways = {(READ, count): meter.reader(count) for count in cores}
    ways |= {(dtype, count): meter.multiplier(dtype, count) for dtype in dtypes for count in cores}
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in ways}
    for _ in range(command.runs):
        for key, way in ways.items():
            rates[key].append(way.rate())
    return LimitsBenchmark(
        num_cpus=host.num_cpus(),
        kernels="torch" if meter.library is None else meter.library.instruction_set,
        runs=command.runs,
        limits=tuple(
            Limit(kind=kind, cores=count, way=ways[kind, count].name, rate=Figure.of(found))
            for (kind, count), found in rates.items()
        ),
    )


def core_counts(num_cpus: int) -> tuple[int, ...]:
    """Return 1, 2, 4 … below `num_cpus`, and itself."""
    powers = (2**power for power in range(num_cpus.bit_length()))
    return (*(count for count in powers if count < num_cpus), num_cpus)


# --- reading ---------------------------------------------------------------------------------------------------------


def _buffer() -> Tensor:
    """Return memory, `[size]` uint8, much larger than any cache, in large pages where the system has them."""
    size = max(SMALLEST_BUFFER, CACHES_IN_BUFFER * _last_cache_bytes())
    size = max(CHUNK_BYTES, min(size, host.free_memory() // 4) // CHUNK_BYTES * CHUNK_BYTES)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).fill_(1)


def _last_cache_bytes() -> int:
    """Return the size of the last cache of all cores together; 0 where the system does not say."""
    sizes: dict[str, int] = {}
    for index in CACHES.glob("cpu[0-9]*/cache/index3"):
        text = (index / "size").read_text().strip()
        sizes[(index / "shared_cpu_list").read_text()] = int(text.removesuffix("K")) * 1024
    return sum(sizes.values())


def _pool(library: KernelLibrary | None, cores: int) -> int | None:
    return None if library is None else library.create_pool(cores, None, SPIN_SECONDS)


def _reader(library: KernelLibrary | None, pool: int | None, cores: int, buffer: Tensor) -> Way:
    if library is None:
        return Way("torch's sum", cores, buffer.nbytes, buffer.view(torch.int64).sum)
    total, read = ctypes.c_uint64(), library.function("read_memory")

    def run() -> None:
        read(pool, ctypes.addressof(total), buffer.data_ptr(), buffer.nbytes // CHUNK_BYTES)

    return Way("C++ loop", cores, buffer.nbytes, run)


# --- multiplying -----------------------------------------------------------------------------------------------------


def _best_of(ways: list[Way]) -> Way:
    """Return the fastest: of two runs after a first one, which may set things up."""
    rates: list[float] = []
    for way in ways:
        first = way.rate()
        is_hopeless = rates and first < HOPELESS * max(rates)
        rates.append(first if is_hopeless else max(way.rate(), way.rate()))
    return ways[rates.index(max(rates))]


def _multipliers(library: KernelLibrary | None, pool: int | None, cores: int, dtype: str) -> list[Way]:
    """Return the ways to multiply matrices of a type, torch's first."""
    torch_dtype = GEMM_DTYPES[dtype]
    if torch_dtype == torch.int8:
        functions = _int8_products()
    else:
        functions = _products(torch_dtype)
        if library is not None and pool is not None and torch_dtype in DTYPES:
            functions["C++ linear"] = _own_product(CPUKernels(library, pool, torch_dtype), torch_dtype)
    tokens, in_features, out_features = _shape(torch_dtype)
    operations = 2 * tokens * in_features * out_features
    return [Way(name, cores, operations, function) for name, function in functions.items()]


def _products(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    x, weight = _operands(dtype)
    ways: dict[str, Callable[[], object]] = {"torch linear": lambda: F.linear(x, weight)}
    if dtype != torch.float16:  # in which the other takes thirty times as long
        transposed = weight.t().contiguous()
        ways["torch matmul"] = lambda: x @ transposed
    return ways


def _int8_products() -> dict[str, Callable[[], object]]:
    x, weight = _operands(torch.int8)
    transposed = weight.t().contiguous()
    multiply: Callable[[Tensor, Tensor], Tensor] = torch._int_mm
    return {"torch _int_mm": lambda: multiply(x, transposed), "torch _int_mm of rows": lambda: multiply(x, weight.t())}


def _own_product(kernels: CPUKernels, dtype: torch.dtype) -> Callable[[], object]:
    x, weight = _operands(dtype)
    return lambda: kernels.linear(x, weight)


def _shape(dtype: torch.dtype) -> tuple[int, int, int]:
    tokens, in_features, out_features = GEMM_SHAPE
    return (FLOAT16_TOKENS if dtype == torch.float16 else tokens), in_features, out_features


def _operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x, `[tokens, in_features]`, and a weight, `[out_features, in_features]`."""
    tokens, in_features, out_features = _shape(dtype)
    shapes = (tokens, in_features), (out_features, in_features)
    if dtype == torch.int8:
        x, weight = (torch.randint(-127, 128, shape, dtype=dtype) for shape in shapes)
    else:
        x, weight = (torch.randn(shape).to(dtype) for shape in shapes)
    return x, weight
