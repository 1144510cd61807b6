"""The threads of the C++ kernels: they end as one, and what they cannot be given is told."""

import subprocess
import sys

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
