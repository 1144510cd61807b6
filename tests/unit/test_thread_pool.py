"""The threads of the C++ kernels: none waits for one that is held up, and what they cannot be given is told."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.kernels.instruction_sets import usable_instruction_sets
from tests.service_process import ROOT

USABLE = [item.name for item in usable_instruction_sets()]

WITH_ROOM_FOR_FEW_STACKS = """
import resource
from engine.kernels.library import KernelLibrary
library = KernelLibrary({name!r})
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (100 << 20),) * 2)
try:
    library.create_pool(64, None, 1e-3)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("name", USABLE)
def test_threads_that_cannot_all_be_had_are_an_error_and_those_that_were_started_end(name: str) -> None:
    script = WITH_ROOM_FOR_FEW_STACKS.format(name=name)
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "64 threads cannot be started\n"), result.stderr


PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_DETACH = 0x4206, 0x4207, 17
WALL = 0x40000000  # waitpid's option __WALL: for threads, too

MULTIPLY_WHEN_TOLD = """
import torch
from engine.kernels.cpu_kernels import CPUKernels
from engine.kernels.library import KernelLibrary
torch.set_num_threads(1)
library = KernelLibrary({name!r})
kernels = CPUKernels(library, library.create_pool({num_threads}, None, 1e-4), torch.float32)
generator = torch.Generator().manual_seed(1)
x, weight = torch.randn(3, 256, generator=generator), torch.randn(512, 256, generator=generator)
expected = x.double() @ weight.double().T
print("ready", flush=True)
input()
for _ in range({num_products}):
    torch.testing.assert_close(kernels.linear(x, weight, None).double(), expected, atol=1e-4, rtol=1e-4)
print("done", flush=True)
"""


@contextmanager
def multiplying(name: str, num_threads: int, num_products: int) -> Iterator["subprocess.Popen[str]"]:
    """Start a process that computes products when it is given a line."""
    script = MULTIPLY_WHEN_TOLD.format(name=name, num_threads=num_threads, num_products=num_products)
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def tell(process: "subprocess.Popen[str]") -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


@contextmanager
def held_up(thread: int) -> Iterator[None]:
    """Stop one thread of a child."""
    trace(PTRACE_SEIZE, thread)
    trace(PTRACE_INTERRUPT, thread)
    os.waitpid(thread, WALL)
    try:
        yield
    finally:
        trace(PTRACE_DETACH, thread)


def trace(request: int, thread: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(request, thread, None, None) != 0:
        pytest.skip(f"no thread can be held up here: {os.strerror(ctypes.get_errno())}")


@pytest.mark.parametrize("name", USABLE)
def test_a_thread_that_is_held_up_holds_up_nobody(name: str) -> None:
    with multiplying(name, num_threads=2, num_products=100) as process:
        threads = [int(path.name) for path in Path(f"/proc/{process.pid}/task").iterdir()]
        with held_up(max(threads)):  # the pool's was started last
            assert tell(process) == "done\n"


@pytest.mark.parametrize("name", USABLE)
def test_more_threads_than_cores_compute_the_same(name: str) -> None:
    with multiplying(name, num_threads=4 * (os.cpu_count() or 1), num_products=200) as process:
        assert tell(process) == "done\n"
