"""`python -m engine.worker SPEC`: one rank, under torchrun's contract (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

`python -m engine.worker`: a process from which ranks are forked, as standard input asks; see `engine.worker.fork`.
"""

import gc
import sys
from pathlib import Path

from engine.worker.parent import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    gc.disable()  # of what is imported nothing is garbage: looking for some takes a tenth of the time
    from engine.protocol.config import read_spec
    from engine.worker.fork import serve_forks
    from engine.worker.rank import run_rank

    gc.freeze()
    path = sys.argv[1] if len(sys.argv) > 1 else serve_forks()
    gc.enable()
    if path is not None:
        sys.exit(run_rank(read_spec(Path(path))))
