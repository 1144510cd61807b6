"""Commands that a process of the engine does in this one's place."""

import os
import signal
import sys
from typing import NoReturn

import msgspec

from server.launch import engine_environment
from server.signals import STOP_SIGNALS


def become(module: str, name: str, command: object) -> NoReturn:
    """Become `python -m module name command`, which takes this process's id, terminal and signals.

    So nothing needs to be passed on, and nothing can be left behind.

    Args:
        module: of the engine.
        name: of the command.
        command: what engine.protocol.commands says of it.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None: its descriptor is closed
            stream.flush()
    # Signals that come from here on wait for the other program, which lets them in when it can answer them.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    content = msgspec.json.encode(command).decode()
    arguments = [sys.executable, "-P", "-m", module, name, content]
    os.execve(sys.executable, arguments, engine_environment())
