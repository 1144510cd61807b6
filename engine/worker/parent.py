"""Who is whose parent: no rank outlives the orchestrator, whichever process it was forked from."""

import ctypes
import os
import signal

from engine.protocol.environment import PARENT_PID_VARIABLE

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def die_with_parent() -> None:
    """Have the kernel kill this process when its launcher dies; do nothing under another launcher, such as torchrun."""
    parent = os.environ.get(PARENT_PID_VARIABLE)
    if parent is None:
        return
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Be the parent of each process below this one whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
