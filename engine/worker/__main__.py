"""`python -m engine.worker SPEC`: one rank, under torchrun's contract (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

`python -m engine.worker`: all ranks of this machine, once their task comes on standard input; see `engine.worker.fork`.
"""

import gc
import sys
from pathlib import Path

from engine.worker.parent import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    gc.disable()  # of what is imported nothing is garbage: looking for some takes a tenth of the time
    import msgspec

    from engine.protocol.config import RankSpec
    from engine.worker.fork import become_ranks
    from engine.worker.rank import run_rank

    gc.freeze()
    path = sys.argv[1] if len(sys.argv) > 1 else become_ranks()
    gc.enable()
    if path is not None:
        sys.exit(run_rank(msgspec.json.decode(Path(path).read_bytes(), type=RankSpec)))
