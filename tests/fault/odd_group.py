"""An orchestrator whose ranks do odd things, as the variable `ODDITY` says.

`slow`: each layer takes `LAYER_SECONDS`. `fails`: the first step of the first epoch raises an error on rank 0.
"""

import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.orchestrator.launcher import ForkServer
from engine.orchestrator.orchestrator import MultiGPUOrchestrator
from engine.protocol.config import read_spec
from engine.protocol.environment import EPOCH_VARIABLE

LAYER_SECONDS = 0.4
FIRST_EPOCH = 7


def slow(forward: Callable[..., Any]) -> Callable[..., Any]:
    def forward_slowly(*arguments: Any) -> Any:
        time.sleep(LAYER_SECONDS)
        return forward(*arguments)

    return forward_slowly


def failing(run: Callable[..., Any]) -> Callable[..., Any]:
    def run_or_fail(*arguments: Any) -> Any:
        if (os.environ[EPOCH_VARIABLE], os.environ["RANK"]) == (str(FIRST_EPOCH), "0"):
            raise RuntimeError("the step is odd")
        return run(*arguments)

    return run_or_fail


def be_ranks() -> None:
    from engine.parallel.block import TensorParallelTransformerBlock  # noqa: PLC0415
    from engine.worker.model_runner import ModelRunner  # noqa: PLC0415

    if os.environ["ODDITY"] == "slow":
        TensorParallelTransformerBlock.forward = slow(TensorParallelTransformerBlock.forward)  # type: ignore[method-assign]
    else:
        ModelRunner.run = failing(ModelRunner.run)  # type: ignore[method-assign]
    sys.argv = sys.argv[:1]
    runpy.run_module("engine.worker", run_name="__main__")


def orchestrate(spec_path: Path) -> int:
    forks = ForkServer((sys.executable, "-m", "tests.fault.odd_group", "--ranks"))
    try:
        return MultiGPUOrchestrator(read_spec(spec_path), spec_path=spec_path, start_ranks=forks.start_ranks).run()
    finally:
        forks.kill()


if __name__ == "__main__":
    if "--ranks" in sys.argv:
        be_ranks()
    else:
        sys.exit(orchestrate(Path(sys.argv[-1])))
