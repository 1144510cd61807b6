"""A port for what a test starts."""

import random
import socket
from contextlib import suppress

PORTS = range(20000, 32000)  # by default Linux gives none of these to a connection, or to who asks for any


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nobody listens, and which nobody else is likely to take."""
    for port in random.SystemRandom().sample(PORTS, 100):  # whatever seed a test has set
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port of 127.0.0.1 is free")
