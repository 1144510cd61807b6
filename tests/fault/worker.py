"""`python -m tests.fault.worker`: ranks that fail where the environment says.

`FAULTS_FOLDER`: a rank that finds a file `wedge-RANK` there takes it away and stays in its next step for ever, in the
middle of what the other ranks wait for. `FAULTS_DEADLY_TOKEN`: rank 0 is killed by each step that computes a sequence
whose prompt begins with that token.
"""

import os
import runpy
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.protocol.messages import ScheduledStep

FOLDER = os.environ.get("FAULTS_FOLDER")
DEADLY_TOKEN = os.environ.get("FAULTS_DEADLY_TOKEN")


def failing(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `ModelRunner.run` with the failures before it."""
    deadly: set[str] = set()

    def run_or_fail(runner: Any, step: ScheduledStep) -> Any:
        rank = int(os.environ["RANK"])
        if FOLDER is not None:
            _wedge_if_told(Path(FOLDER) / f"wedge-{rank}")
        if DEADLY_TOKEN is not None and rank == 0:
            deadly.update(
                row.request_id for row in step.rows if row.is_new and row.new_token_ids[0] == int(DEADLY_TOKEN)
            )
            if any(row.request_id in deadly for row in step.rows):
                os.kill(os.getpid(), signal.SIGKILL)
        return run(runner, step)

    return run_or_fail


def _wedge_if_told(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        return
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    # The first process imports torch before it is told what to run, and forks the ranks: they inherit the change.
    from engine.worker import model_runner

    model_runner.ModelRunner.run = failing(model_runner.ModelRunner.run)  # type: ignore[method-assign]
    runpy.run_module("engine.worker", run_name="__main__")
