"""An orchestrator whose ranks, where there are several, forget to sum: what a split model says is then wrong."""

import sys
from functools import partial
from pathlib import Path

from torch import Tensor

from engine.communication.handler import CommunicationHandler
from engine.orchestrator.launcher import RankProcesses
from engine.orchestrator.orchestrator import MultiGPUOrchestrator
from engine.protocol.config import read_spec
from engine.worker.rank import run_rank

START_RANKS = partial(RankProcesses, command=(sys.executable, "-m", "tests.fault.wrong_sums_group", "--rank"))


def forget_to_sum(_: CommunicationHandler, tensor: Tensor) -> Tensor:
    return tensor


if __name__ == "__main__":
    spec = read_spec(Path(sys.argv[-1]))
    if "--rank" in sys.argv:
        CommunicationHandler.all_reduce = forget_to_sum  # type: ignore[method-assign, assignment]
        sys.exit(run_rank(spec))
    sys.exit(MultiGPUOrchestrator(spec, spec_path=Path(sys.argv[-1]), start_ranks=START_RANKS).run())
