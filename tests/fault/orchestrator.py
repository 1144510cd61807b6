"""`python -m tests.fault.orchestrator [SPEC]`: the orchestrator, whose ranks can be told to fail."""

import runpy
import sys

from engine.orchestrator import launcher

launcher.RANK_COMMAND = (sys.executable, "-m", "tests.fault.worker")

if __name__ == "__main__":
    runpy.run_module("engine.orchestrator", run_name="__main__")
