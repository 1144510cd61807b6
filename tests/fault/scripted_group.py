"""An orchestrator whose ranks follow a script: in each epoch rank 0 dies between its READY and rank 1's."""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import zmq

from engine.orchestrator.launcher import RankProcesses
from engine.orchestrator.orchestrator import MultiGPUOrchestrator
from engine.protocol.channel import Channel
from engine.protocol.config import RankSpec, config_hash, read_spec
from engine.protocol.messages import Hello, Ready, Start

START_RANKS = partial(RankProcesses, command=(sys.executable, "-m", "tests.fault.scripted_group", "--rank"))


def be_rank(spec: RankSpec, rank: int) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    control = Channel(context, spec.epoch, Start)
    control.connect(spec.control_endpoint(rank))
    control.send(Hello(spec.epoch, rank, os.getpid(), "here", "cpu", config_hash(spec.engine)))
    is_dead = Path(spec.run_dir) / f"steps-{spec.epoch}-rank0-is-dead"
    if rank == 1:
        while not is_dead.exists():
            time.sleep(0.001)
        time.sleep(0.05)
    control.send(Ready(spec.epoch, rank, "same", 64, 1, {}))
    if rank == 0:
        time.sleep(2)  # for the words to arrive
        is_dead.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


if __name__ == "__main__":
    spec = read_spec(Path(sys.argv[-1]))
    if "--rank" in sys.argv:
        be_rank(spec, int(os.environ["RANK"]))
    else:
        sys.exit(MultiGPUOrchestrator(spec, spec_path=Path(sys.argv[-1]), start_ranks=START_RANKS).run())
