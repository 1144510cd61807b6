"""`python -m tests.fault.serve serve …`: the service, with ranks that can be told to fail (see `tests.fault.worker`).

The product has no such switch: what starts the ranks is replaced here, in the process that starts them.
"""

import sys

from server import early_engine

early_engine.ORCHESTRATOR = (sys.executable, "-m", "tests.fault.orchestrator")

if __name__ == "__main__":
    from server.__main__ import main

    sys.exit(main())
