"""An HTTP server of the tests, on this machine."""

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


class PostHandler(BaseHTTPRequestHandler):
    """Hands what is posted to `take`, answers with the status that this returns, and writes nothing about it."""

    def take(self, body: bytes) -> int:
        """Take a body."""
        raise NotImplementedError

    def do_POST(self) -> None:
        status = self.take(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Write nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Let clients go when they like; say anything else."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class HTTPServer:
    """`with` it, `handler` answers in a thread for each connection.

    Args:
        handler: of the requests.
        path: that `url` ends with.
    """

    def __init__(self, handler: type[BaseHTTPRequestHandler], path: str = "") -> None:
        self._server = _Server(("127.0.0.1", 0), handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}{path}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
