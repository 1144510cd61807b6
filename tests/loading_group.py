"""Ranks that load by a script, under a real orchestrator and, with --serve, a real service.

    python -m tests.loading_group SPEC               the orchestrator
    python -m tests.loading_group --rank SPEC        a rank
    python -m tests.loading_group --serve [OPTIONS]  `ryzanstein serve [OPTIONS]` with this orchestrator

Rank r has (r + 1) * `UNIT` bytes to load, comes to half of it at once, and on slowly from there, until its folder, the
variable `FOLDER_VARIABLE`, has a file: `finish`, and it becomes ready; `die`, and it is killed; `stall`, and it
stands still with one byte to go, and is silent, until another file comes.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO

import zmq

from engine.orchestrator.launcher import RankProcesses
from engine.orchestrator.orchestrator import MultiGPUOrchestrator
from engine.protocol.channel import Channel
from engine.protocol.config import RankSpec, config_hash, read_spec
from engine.protocol.messages import Hello, Loading, Ready, Start, Started
from engine.worker.parent import die_with_parent
from engine.worker.progress import LoadingReporter
from server import cli
from server.launch import EngineProcess

UNIT = 2**30
FOLDER_VARIABLE = "LOADING_SCRIPT"
COMMAND = (sys.executable, "-m", "tests.loading_group")


def be_rank(spec: RankSpec, rank: int) -> None:
    die_with_parent()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    control = Channel(context, spec.epoch, Start)
    control.connect(spec.control_endpoint(rank))
    control.send(Hello(spec.epoch, rank, os.getpid(), "here", "cpu", config_hash(spec.engine)))
    load(control, spec.epoch, rank)
    control.send(Ready(spec.epoch, rank, "same", 64, 1, {}))
    control.receive()
    control.send(Started(spec.epoch, rank))
    time.sleep(300)


def load(control: Channel, epoch: int, rank: int) -> None:
    folder, report = Path(os.environ[FOLDER_VARIABLE]), LoadingReporter(control, epoch, rank)
    total_bytes = (rank + 1) * UNIT
    loaded_bytes, is_stalled = total_bytes // 2, False
    while not (folder / "finish").exists():
        if (folder / "die").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if not is_stalled:
            report(loaded_bytes, total_bytes)
            loaded_bytes = min(loaded_bytes + 2**16, total_bytes - 2)
        if not is_stalled and (folder / "stall").exists():
            control.send(Loading(epoch, rank, total_bytes - 1, total_bytes))
            is_stalled = True
        time.sleep(0.02)
    report(total_bytes, total_bytes)


def serve(arguments: list[str]) -> int:
    start = EngineProcess._start

    def start_this(self: EngineProcess, command: Sequence[str], stdout: int | IO[str]) -> "subprocess.Popen[bytes]":
        return start(self, [*COMMAND, command[-1]], stdout)

    EngineProcess._start = start_this  # type: ignore[method-assign]
    return cli.main(["serve", *arguments])


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        sys.exit(serve(sys.argv[2:]))
    spec = read_spec(Path(sys.argv[-1]))
    if sys.argv[1] == "--rank":
        be_rank(spec, int(os.environ["RANK"]))
    else:
        ranks = partial(RankProcesses, command=(*COMMAND, "--rank"))
        sys.exit(MultiGPUOrchestrator(spec, spec_path=Path(sys.argv[-1]), start_ranks=ranks).run())
