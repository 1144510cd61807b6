"""No rank outlives the orchestrator that launched it."""

import ctypes
import os
import signal

from engine.protocol.environment import PARENT_PID_VARIABLE

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Have the kernel kill this process when its launcher dies; do nothing under another launcher, such as torchrun."""
    parent = os.environ.get(PARENT_PID_VARIABLE)
    if parent is None:
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(parent):  # it died before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)
