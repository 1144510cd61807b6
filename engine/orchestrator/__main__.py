"""`python -m engine.orchestrator [SPEC]`: run a rank group until standard input ends or SIGTERM comes.

Without SPEC, standard input first says where that is, in a line: the process that ranks are forked from imports torch
meanwhile.
"""

import contextlib
import os
import sys
from pathlib import Path

from engine.orchestrator.launcher import RANK_COMMAND, ForkServer


def main(forks: ForkServer) -> int:
    """Return the exit code."""
    from engine.orchestrator.orchestrator import MultiGPUOrchestrator  # noqa: PLC0415  (takes long)
    from engine.protocol.config import read_spec  # noqa: PLC0415
    from engine.protocol.logs import write_json  # noqa: PLC0415

    path = sys.argv[1] if len(sys.argv) > 1 else os.fsdecode(os.read(0, 4096)).removesuffix("\n")
    if not path:
        return 0
    spec = read_spec(Path(path))
    if spec.log.is_json:
        write_json(spec.log.level, process="orchestrator")
    return MultiGPUOrchestrator(spec, spec_path=Path(path), start_ranks=forks.start_ranks).run()


if __name__ == "__main__":
    with contextlib.ExitStack() as ending:
        forks = ForkServer(RANK_COMMAND)
        ending.callback(forks.kill)
        sys.exit(main(forks))
