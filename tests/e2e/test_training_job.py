"""The training job of docs/guide.md, as it stands there, under torchrun."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.checkpoint.metadata import CheckpointMetadata
from engine.checkpoint.model_distributor import ModelDistributor
from engine.communication.handler import CommunicationHandler
from engine.parallel.base import split_evenly
from engine.parallel.linear import ColumnParallelLinear, RowParallelLinear
from engine.protocol.model_directory import find_model_directory, steps_in

ROOT = Path(__file__).parents[2]


def section() -> str:
    """Return the guide's section."""
    guide = (ROOT / "docs/guide.md").read_text()
    (found,) = re.findall(r"### Save from a training job\n(.*?)\n##", guide, re.DOTALL)
    return str(found)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the job has written."""
    folder = tmp_path_factory.mktemp("job")
    (program,) = re.findall(r"```python\n(.*?)```", section(), re.DOTALL)
    (folder / "train.py").write_text(program)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=200,
    )
    return folder / "checkpoints"


def test_the_job_leaves_the_steps_that_the_guide_names(trained: Path) -> None:
    named = [int(step) for step in re.findall(r"`model-step-(\d+)`", section())]
    assert steps_in(trained) == named


def test_what_the_job_has_saved_is_what_it_has_learnt(trained: Path) -> None:
    group = CommunicationHandler(torch.device("cpu"))
    hidden = split_evenly(64, 1)
    model = nn.Sequential(
        ColumnParallelLinear(8, [hidden], group, device=group.device, dtype=torch.float32),
        nn.Tanh(),
        RowParallelLinear(hidden, 1, group, device=group.device, dtype=torch.float32),
    )
    ModelDistributor(group).load_model(model, trained)
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(1))
    loss = float((model(x) - x.sum(dim=1, keepdim=True)).detach().pow(2).mean())
    saved = CheckpointMetadata.read(find_model_directory(trained)).extra["loss"]
    assert loss < 1  # of a variance of 8
    assert abs(loss - saved) < 0.5
