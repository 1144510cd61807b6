"""Where the threads of this process may run."""

import contextlib
import os
from collections.abc import Collection


def keep_process_on(cpus: Collection[int]) -> None:
    """Let every thread of this process, and each that it starts from now on, run on these CPUs alone.

    Does nothing if there are none, or if the system does not let it: it is a matter of speed alone.
    """
    if cpus:
        for thread in os.listdir("/proc/self/task"):  # noqa: PTH208  (a name is the number that is needed)
            with contextlib.suppress(OSError):  # it has ended, or what may be used has changed
                os.sched_setaffinity(int(thread), cpus)
