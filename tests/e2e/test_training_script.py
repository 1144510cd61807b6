"""The command that docs/embedded-model.md gives, for a moment instead of an hour."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service_process import ServiceProcess

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_training_command_writes_a_model_that_can_be_served(tmp_path: Path) -> None:
    (command,) = re.findall(r"```\n(python -m .*)\n```", (ROOT / "docs/embedded-model.md").read_text())
    words = command.replace("--minutes 60 --compile", "--minutes 0.1").split()
    words[0], words[-1] = sys.executable, str(tmp_path / "model")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"held out: \d+ bytes, [\d.]+ bits per byte; xz -9e [\d.]+", done.stdout)
    with ServiceProcess(str(tmp_path / "model"), "-tp", "4") as service:
        assert service.complete(prompt="def f(", max_tokens=4, ignore_eos=True)["finish_reason"] == "length"
