"""`python -m engine.orchestrator SPEC`: run a rank group until standard input ends or SIGTERM comes."""

import sys
from pathlib import Path

import msgspec

from engine.orchestrator.orchestrator import MultiGPUOrchestrator
from engine.protocol.config import RankSpec

if __name__ == "__main__":
    spec = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=RankSpec)
    sys.exit(MultiGPUOrchestrator(spec, spec_path=Path(sys.argv[1])).run())
