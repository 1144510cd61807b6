"""The TCP socket that the service listens on: taken first, so that a port in use is found before any work is done."""

import errno
import socket

MOST_UNSENT = 1 << 16  # bytes of a connection that the system takes before the client takes those before them
PORT_ERRORS = (errno.EADDRINUSE, errno.EACCES)  # of any other the address is the cause


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        ValueError: naming --host or --port, when it cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(f"--host {host}: not an address: {error}") from error
    family, kind, protocol, _, address = found[0]
    try:
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MOST_UNSENT)  # connections inherit it
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> ValueError:
    option = f"--port {port}" if error.errno in PORT_ERRORS else f"--host {host}"
    return ValueError(f"{option}: cannot listen on {host}:{port}: {error.strerror}")
