"""`python -m engine.worker SPEC`: one rank, under torchrun's contract (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)."""

import sys
from pathlib import Path

import msgspec

from engine.protocol.config import RankSpec
from engine.worker.rank import run_rank

if __name__ == "__main__":
    sys.exit(run_rank(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=RankSpec)))
