"""What docs/deployment.md sets up: the systemd unit, nginx before the service, and an upgrade that loses nothing."""

import configparser
import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme

from engine.protocol.errors import EXIT_USER_ERROR
from server.config import ServerConfig
from server.http_server import KEEP_ALIVE_SECONDS
from tests.service_process import ServiceProcess, wait_until

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "systemd" / "ryzanstein.service"
NGINX = ROOT / "deploy" / "nginx" / "ryzanstein.conf"
PAGE = (ROOT / "docs" / "deployment.md").read_text()
NUM_TOKENS = 200
SMALLEST_BUFFER = 4096  # bytes, that nginx would fill before it passes anything on
REQUEST = {"prompt": "import ", "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True}
MAIN_CONFIGURATION = """
{user}
daemon off;
pid {folder}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/ryzanstein.conf;
}}
"""


def unit() -> configparser.SectionProxy:
    """Return the unit's section about the service."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return parser["Service"]


def block_with(words: str) -> str:
    """Return the page's bash block that contains `words`."""
    blocks: list[str] = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    (found,) = [block for block in blocks if words in block]
    return found


# --- systemd ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    here = tmp_path / UNIT.name
    here.write_text(UNIT.read_text().replace("/opt/ryzanstein/.venv/bin/ryzanstein", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(here)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_runs_the_command_of_the_page() -> None:
    command = unit()["ExecStart"].replace("/opt/ryzanstein/.venv/bin/", "")
    command = command.replace("/etc/ryzanstein/options.yaml", "$OPTIONS").replace("%d/api-key", "$KEY_FILE")
    assert command.split() == shlex.split(block_with('--config "$OPTIONS"'))


def test_the_unit_waits_for_a_drain_and_does_not_repeat_a_mistake_of_the_user() -> None:
    assert unit()["KillMode"] == "mixed"
    assert int(unit()["TimeoutStopSec"].removesuffix("s")) > ServerConfig.drain_timeout
    assert unit()["RestartPreventExitStatus"] == str(EXIT_USER_ERROR)


def test_a_loss_of_memory_is_the_services_to_mend() -> None:
    assert unit()["OOMPolicy"] == "continue"


# --- nginx -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service() -> Iterator[ServiceProcess]:
    with ServiceProcess() as service:
        yield service


@pytest.fixture(scope="module")
def proxy(service: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of nginx, which runs with the file of the page before a service."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed")
    folder = tmp_path_factory.mktemp("nginx")
    authority = trustme.CA()
    issued = authority.issue_cert("llm.example.org")
    issued.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    text = NGINX.read_text().replace("listen 443 ssl", f"listen unix:{folder}/socket ssl")
    text = text.replace("127.0.0.1:8000", service.url.removeprefix("http://"))
    (folder / "ryzanstein.conf").write_text(text.replace("/etc/ssl/llm.example.org", str(folder)))
    user = "user root;" if os.geteuid() == 0 else ""  # its workers write below the folder, too
    (folder / "nginx.conf").write_text(MAIN_CONFIGURATION.format(folder=folder, user=user))
    process = subprocess.Popen([program, "-p", str(folder), "-c", str(folder / "nginx.conf")])
    try:
        wait_until(lambda: (folder / "socket").exists() or process.poll() is not None, 30)
        trust = ssl.create_default_context()
        authority.configure_trust(trust)
        with httpx.Client(
            transport=httpx.HTTPTransport(verify=trust, uds=str(folder / "socket")),
            base_url="https://llm.example.org",
            timeout=60,
        ) as client:
            yield client
    finally:
        process.terminate()
        process.wait(20)


def test_nginx_passes_events_on_as_they_come(proxy: httpx.Client) -> None:
    with proxy.stream("POST", "/v1/completions", json=REQUEST) as answer:
        first, *others = list(answer.iter_raw())
    assert first.startswith(b"id: 1\n")
    assert len(first) < SMALLEST_BUFFER
    assert others[-1].endswith(b"data: [DONE]\n\n")


def test_a_client_that_leaves_nginx_leaves_the_engine(proxy: httpx.Client, service: ServiceProcess) -> None:
    before = service.metric("ryzanstein_integrity_checks_total")
    with proxy.stream("POST", "/v1/completions", json=REQUEST) as answer:
        next(answer.iter_raw())
    service.wait_until_idle(before)


def test_nginx_takes_requests_as_large_as_the_service_does(proxy: httpx.Client) -> None:
    assert ServerConfig.max_body_size == 16 * 2**20
    body = b" " * (ServerConfig.max_body_size - 100) + json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    answer = proxy.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200


def test_nginx_names_requests_and_keeps_metrics_inside(proxy: httpx.Client, service: ServiceProcess) -> None:
    name = proxy.get("/v1/models").headers["x-request-id"]
    wait_until(lambda: f"[{name}]" in service.stderr, 30)
    assert proxy.get("/ready").status_code == 200
    assert [proxy.get(path).status_code for path in ("/metrics", "/docs", "/openapi.json", "/")] == [404] * 4


def test_nginx_tells_no_address_that_a_client_made_up(proxy: httpx.Client, service: ServiceProcess) -> None:
    name = proxy.get("/v1/models", headers={"X-Forwarded-For": "203.0.113.9"}).headers["x-request-id"]
    wait_until(lambda: f"[{name}]" in service.stderr, 30)
    (line,) = [line for line in service.stderr.splitlines() if f"[{name}]" in line]
    assert "203.0.113.9" not in line


def test_nginx_closes_idle_connections_before_the_service_does() -> None:
    (upstream,) = re.findall(r"upstream ryzanstein \{(.*?)\}", NGINX.read_text(), re.DOTALL)
    (seconds,) = re.findall(r"keepalive_timeout (\d+)s;", upstream)
    assert int(seconds) < KEEP_ALIVE_SECONDS


# --- upgrades --------------------------------------------------------------------------------------------------------


def run_block(words: str, **variables: str) -> None:
    """Run the page's block with `words`, another service's port for 8001."""
    block = block_with(words).replace("127.0.0.1:8001", variables.get("NEW", ""))
    subprocess.run(["bash", "-euc", block], env={**os.environ, **variables}, check=True, timeout=120)


@pytest.mark.slow
def test_an_upgrade_lets_the_old_service_finish_while_the_new_one_answers() -> None:
    with ServiceProcess() as old, ServiceProcess() as new:
        run_block("127.0.0.1:8001", NEW=new.url.removeprefix("http://"))
        with httpx.stream("POST", f"{old.url}/v1/completions", json=REQUEST, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            run_block("OLD_PID", OLD_PID=str(old.process.pid))
            wait_until(lambda: "may take" in old.stderr, 30)
            assert httpx.get(f"{old.url}/ready").status_code == 503
            assert new.complete(prompt="import ", max_tokens=4)["text"]
            assert "data: [DONE]" in list(lines)
        assert old.process.wait(60) == 0
