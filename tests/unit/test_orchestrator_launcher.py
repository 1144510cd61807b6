"""How a rank's end is described."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.checkpoint.tensor_writer import TensorFileWriter
from engine.orchestrator.launcher import describe_exit

USE_A_CUT_FILE = """
import os, pathlib, sys
from engine.checkpoint.tensor_file import TensorFile
path = pathlib.Path(sys.argv[1])
file = TensorFile(path)
os.truncate(path, 100)
file.read("weight").sum()
"""


def test_a_rank_whose_mapped_file_was_cut_is_said_to_have_lost_it(tmp_path: Path) -> None:
    path = tmp_path / "weights_rank0.safetensors"
    with TensorFileWriter(path, [("weight", torch.float32, (1 << 16,))]) as writer:
        writer.write("weight", torch.ones(1 << 16))
    done = subprocess.run([sys.executable, "-c", USE_A_CUT_FILE, str(path)], timeout=120, check=False)
    assert describe_exit(done.returncode).startswith("was killed by SIGBUS: memory behind which there is nothing")
    assert "--no-mmap" in describe_exit(done.returncode)


@pytest.mark.parametrize(
    ("code", "text"),
    [(-signal.SIGKILL, "was killed by SIGKILL"), (-63, "was killed by signal 63"), (3, "exited with code 3")],
)
def test_other_ends_are_named(code: int, text: str) -> None:
    assert describe_exit(code) == text
