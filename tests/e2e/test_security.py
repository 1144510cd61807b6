"""Keys, certificates, limits and paths of a whole service, with everything it starts."""

import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import trustme

from tests.leftovers import Leftovers
from tests.service_process import ROOT, ServiceProcess

KEY, PASSWORD = "sk-secret-4711", "pass-secret-4711"
MEBIBYTE = 2**20


def without_service(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command line that ends by itself."""
    command = [sys.executable, "-P", "-m", "server", "serve", "--port", "0", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def secrets_seen(process: psutil.Process) -> list[str]:
    """Return which secrets the kernel shows of a process to its user."""
    folder = Path(f"/proc/{process.pid}")
    shown = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
    return [secret for secret in (KEY, PASSWORD) if secret.encode() in shown]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with certificate, key and authority."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    client = authority.issue_cert("client")
    client.private_key_and_cert_chain_pem.write_to_path(folder / "client.pem")
    return folder


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    """Where the service makes its temporary files: with a short name, or the paths of sockets were too long."""
    with tempfile.TemporaryDirectory(prefix="rz-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def locked(temporary: Path) -> Iterator[ServiceProcess]:
    """Behind a proxy that strips /llm, and locked by a key from the environment; two ranks."""
    options = ("--tensor-parallel-size", "2", "--root-path", "/llm", "--log-level", "debug")
    with ServiceProcess(*options, environment={"RYZANSTEIN_API_KEY": KEY, "TMPDIR": str(temporary)}) as service:
        yield service


def test_the_key_stays_in_the_server(locked: ServiceProcess) -> None:
    authorization = {"authorization": f"Bearer {KEY}"}
    body = {"prompt": "private words", "max_tokens": 4}
    url = f"{locked.url}/v1/completions"
    assert httpx.post(url, json=body).status_code == 401
    assert httpx.post(url, json=body, headers=authorization).status_code == 200
    below = locked.descendants()
    assert len(below) == 4  # orchestrator, what ranks are forked from, and ranks
    assert [secrets_seen(process) for process in below] == [[], [], [], []]
    assert secrets_seen(psutil.Process(locked.process.pid)) == [KEY]  # so that it would be found
    assert KEY not in locked.stderr
    assert "private" not in locked.stderr
    assert "POST /v1/completions 401" in locked.stderr


@pytest.mark.usefixtures("locked")
def test_the_folder_that_the_ranks_read_does_not_hold_the_key(temporary: Path) -> None:
    (spec,) = temporary.glob("ryzanstein-*/spec.json")
    assert b'"model"' in spec.read_bytes()
    assert all(KEY.encode() not in path.read_bytes() for path in spec.parent.iterdir() if path.is_file())


def test_documentation_behind_a_proxy_leads_through_the_proxy(locked: ServiceProcess) -> None:
    schema = httpx.get(f"{locked.url}/openapi.json").json()
    assert schema["servers"] == [{"url": "/llm"}]
    page = httpx.get(f"{locked.url}/docs").text
    assert "'/llm/openapi.json'" in page
    assert 'href="/llm/docs/assets/' in page


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/metrics", "/version", "/docs/assets/swagger-ui.css", "/openapi.json"]
)
def test_open_paths_are_open_behind_a_proxy(locked: ServiceProcess, path: str) -> None:
    assert httpx.get(f"{locked.url}{path}").status_code == 200
    assert httpx.get(f"{locked.url}/llm{path}").status_code == 401  # which the proxy would have stripped


@pytest.mark.parametrize("announced", [True, False])
def test_an_upload_of_200_mib_takes_no_memory(
    locked: ServiceProcess, tell: Callable[[str], None], announced: bool
) -> None:
    server = psutil.Process(locked.process.pid)
    sizes = []

    def pieces() -> Iterator[bytes]:
        for _ in range(200):
            sizes.append(server.memory_info().rss)
            yield b"x" * MEBIBYTE

    size = {"content-length": str(200 * MEBIBYTE)} if announced else {}
    headers = {"authorization": f"Bearer {KEY}", **size}
    answer = httpx.post(f"{locked.url}/v1/completions", content=pieces(), headers=headers, timeout=120)
    growth = (max(sizes) - sizes[0]) / MEBIBYTE
    tell(f"upload of 200 MiB, {'announced' if announced else 'chunked'}: server grew by {growth:.1f} MiB")
    assert answer.status_code == 413
    assert growth < 3 * 16  # the limit, while it is put together


@pytest.fixture(scope="module")
def secure(certificate: Path) -> Iterator[tuple[ServiceProcess, ssl.SSLContext]]:
    options = ("--ssl-certfile", str(certificate / "cert.pem"), "--ssl-keyfile", str(certificate / "key.pem"))
    with ServiceProcess(*options) as service:
        yield service, ssl.create_default_context(cafile=certificate / "ca.pem")


def test_completions_stream_over_tls(secure: tuple[ServiceProcess, ssl.SSLContext]) -> None:
    service, trust = secure
    assert service.url.startswith("https://")
    assert f"{service.url}/v1" in service.stderr
    body = {"prompt": "import ", "max_tokens": 8, "stream": True}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, verify=trust, timeout=60) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 2


def test_sigterm_ends_a_service_with_open_tls_connections_cleanly(certificate: Path) -> None:
    options = (
        *("--ssl-certfile", str(certificate / "cert.pem"), "--ssl-keyfile", str(certificate / "key.pem")),
        *("--ssl-ca-certs", str(certificate / "ca.pem"), "--ssl-cert-reqs", "2"),
    )
    trust = ssl.create_default_context(cafile=certificate / "ca.pem")
    trust.load_cert_chain(certificate / "client.pem")
    with Leftovers() as leftovers, ServiceProcess(*options, environment=leftovers.environment) as service:
        processes = service.descendants()
        host, port = service.url.removeprefix("https://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as plain:
            idle = trust.wrap_socket(plain, server_hostname=host)
            with httpx.Client(verify=trust, timeout=60) as client:
                assert client.get(f"{service.url}/health").status_code == 200
                service.process.send_signal(signal.SIGTERM)
                assert service.process.wait(20) == 0
            idle.close()
        leftovers.check(processes)
        assert "Traceback" not in service.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--ssl-keyfile", "key.pem"], "--ssl-keyfile has no effect without --ssl-certfile"),
        (["--ssl-certfile", "nowhere.pem"], "--ssl-certfile nowhere.pem: No such file"),
        (["--api-key-file", "nowhere"], "--api-key-file nowhere: No such file"),
        (["--api-key", ""], "--api-key: is empty"),
        (["--allowed-origins", "*", "--allow-credentials"], "--allow-credentials"),
        (["--root-path", "llm/"], "--root-path"),
        (["--max-body-size", "lots"], "--max-body-size"),
    ],
)
def test_a_wrong_option_ends_the_start_in_one_line_before_anything_is_launched(
    arguments: list[str], named: str
) -> None:
    done = without_service(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("ryzanstein: error: ")
    assert named in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_names_the_options_of_security() -> None:
    shown = without_service("--help").stdout
    for option in ("--api-key-file", "--ssl-certfile", "--allowed-origins", "--root-path", "--max-body-size"):
        assert option in shown
    assert "16.0 MiB" in shown
