"""The image's health check, as the container engine runs it: a process with the service's variables."""

import json
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trustme

SCRIPT = Path(__file__).parents[2] / "deploy" / "container" / "healthcheck.py"


@contextmanager
def service(answer: bytes, status: int = 200, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """Answer /ready with these bytes on a free port of 127.0.0.1, which is yielded."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/ready"
            self.send_response(status if found else 404)
            self.end_headers()
            self.wfile.write(answer if found else b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def check(**variables: str) -> "subprocess.CompletedProcess[str]":
    """Run it in the image's way with these variables after `RYZANSTEIN_`, and no others."""
    environment = {f"RYZANSTEIN_{name}": value for name, value in variables.items()}
    command = [sys.executable, "-IS", str(SCRIPT)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("state", "status"), [("READY", 200), ("RECOVERING", 503), ("DRAINING", 503)])
def test_a_service_that_takes_requests_or_finishes_them_is_healthy(state: str, status: int) -> None:
    with service(json.dumps({"state": state}).encode(), status) as port:
        done = check(HOST="0.0.0.0", PORT=str(port))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("state", ["STARTING", "FAILED"])
def test_a_service_that_takes_none_is_not(state: str) -> None:
    with service(json.dumps({"state": state}).encode(), 503) as port:
        done = check(PORT=str(port))
    assert (done.returncode, done.stderr) == (1, f"its state is {state}\n")


@pytest.mark.parametrize("answer", [b"", b"no JSON", b"[]", b"{}"])
def test_what_is_no_answer_of_the_service_is_one_line(answer: bytes) -> None:
    with service(answer) as port:
        done = check(PORT=str(port))
    assert done.returncode == 1
    assert done.stderr.startswith("it does not answer: ")
    assert done.stderr.count("\n") == 1


def test_a_port_on_which_nobody_listens_is_one_line() -> None:
    with socket.socket() as bound:  # it does not listen
        bound.bind(("127.0.0.1", 0))
        done = check(PORT=str(bound.getsockname()[1]))
    assert done.returncode == 1
    assert "Connection refused" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_service_of_https_is_asked_by_https_whatever_name_its_certificate_has() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("llm.example.org").configure_cert(context)
    with service(b'{"state": "READY"}', tls=context) as port:
        assert check(PORT=str(port), SSL_CERTFILE="certificate.pem").returncode == 0
        assert check(PORT=str(port)).returncode == 1
