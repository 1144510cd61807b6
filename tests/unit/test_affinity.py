"""Where a process's threads run."""

import subprocess
import sys

PROGRAM = """
import os, threading
from engine.protocol.affinity import keep_process_on
has_begun, may_end = threading.Event(), threading.Event()
def wait():
    has_begun.set()
    may_end.wait()
earlier = threading.Thread(target=wait)
earlier.start()
has_begun.wait()
allowed = os.sched_getaffinity(0)
keep_process_on([])
assert os.sched_getaffinity(earlier.native_id) == allowed
keep_process_on([max(allowed)])
later = threading.Thread(target=wait)
later.start()
print(*(os.sched_getaffinity(thread) == {max(allowed)} for thread in (0, earlier.native_id, later.native_id)))
keep_process_on([5000])
may_end.set()
"""


def test_all_threads_of_a_process_earlier_and_later_ones_are_kept_on_what_there_is() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["True"] * 3
