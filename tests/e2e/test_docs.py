"""Every command in docs/, as it stands there; and what the pages say is there."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme

from engine.protocol.config import EMBEDDED_MODEL, EngineConfig
from engine.protocol.model_directory import step_directory
from server.bench_commands import COMMANDS as BENCH_COMMANDS
from server.checkpoint_commands import COMMANDS
from server.config import ServerConfig
from server.options import options_of
from tests.hub import Hub, Repository, files_of
from tests.service_process import ServiceProcess

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ADDRESS = "http://127.0.0.1:8000"
PAGES = (
    "guide.md",
    "development.md",
    "from-vllm.md",
    "architecture.md",
    "capacity.md",
    "deployment.md",
    "troubleshooting.md",
)
# Pages whose commands are run, or checked, elsewhere; other pages have none.
ELSEWHERE = {
    "kubernetes.md": "tests/e2e/test_kubernetes_docs.py",
    "container.md": "tests/container",
    "monitoring.md": "tests/e2e/test_monitoring.py",
}
# Blocks that are not run here, by their first words, and why.
NOT_RUN = {
    "sudo install -D": "needs root and systemd; test_deployment.py checks the unit, and runs its command",
    "systemctl status": "needs systemd",
    ".venv/bin/python -m engine.kernels.build": "test_kernel_build.py compiles; here it would replace what others load",
    "journalctl -k": "needs systemd's journal",
    "sudo install -m 644 deploy/nginx": "needs root; test_deployment.py runs nginx with the file",
    "curl -fsS --retry 100 --retry-delay 1 --retry-all-errors http://127.0.0.1:8001": "run by test_deployment.py",
    'kill -TERM "$OLD_PID"': "run by test_deployment.py",
}


def commands(page: str) -> list[str]:
    """Return the page's bash blocks."""
    return re.findall(r"```bash\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def every_block() -> list[str]:
    """Return the blocks of all pages; what stands on several is there once."""
    return list(dict.fromkeys(block for page in PAGES for block in commands(page)))


def all_commands(kind: str) -> list[str]:
    """Return the blocks of all pages that start a service, run make, or ask a service."""
    kinds = {"serve": r"ryzanstein serve(?!.*--help)", "make": r"\s*make "}
    blocks = [block for block in every_block() if not block.startswith(tuple(NOT_RUN))]
    if kind in kinds:
        return [block for block in blocks if re.match(kinds[kind], block)]
    return [block for block in blocks if not any(re.match(pattern, block) for pattern in kinds.values())]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """What stands in for the hub."""
    with Hub({"org/name": Repository({"main": files_of(EMBEDDED_MODEL)})}) as hub:
        yield hub


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> dict[str, str]:
    """The variables that the pages leave to the reader."""
    folder = tmp_path_factory.mktemp("guide")
    (folder / "api-key").write_text("a-key-of-the-guide\n")
    issued = trustme.CA().issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    return {
        **hub.environment(folder / "huggingface"),
        "CACHE": str(folder / "shards"),
        "FOLDER": str(folder / "checkpoints"),
        "SHARDED": str(sharded_model(folder / "steps")),
        "STEPS": str(folder / "steps"),
        "MODEL": str(EMBEDDED_MODEL),
        "KEY_FILE": str(folder / "api-key"),
        "OPTIONS": str(options_file(folder)),
        "CERTIFICATE": str(folder / "certificate.pem"),
        "KEY": str(folder / "key.pem"),
        "RYZANSTEIN_PORT": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


def options_file(folder: Path) -> Path:
    """Write the file of options that deployment.md shows, for the model that is here and a machine of any size."""
    (text,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "deployment.md").read_text(), re.DOTALL)
    path = folder / "options.yaml"
    own = {"model": step_directory(folder / "steps", 1000), "max-model-len": 1024, "kv-cache-memory": "64MiB"}
    for name, value in own.items():
        text, count = re.subn(f"(?m)^{name}: .*", f"{name}: {value}", text)
        assert count == 1, name
    path.write_text(text)
    return path


def sharded_model(parent: Path) -> Path:
    """Return the embedded model as a distributed checkpoint: the one of step 1000 in `parent`."""
    directory = step_directory(parent, 1000)
    command = [sys.executable, "-P", "-m", "server", "checkpoint", "shard", str(EMBEDDED_MODEL), str(directory)]
    subprocess.run([*command, "--tensor-parallel-size", "2"], cwd=ROOT, check=True, timeout=200)
    return directory


@pytest.fixture(scope="module")
def service() -> Iterator[ServiceProcess]:
    with ServiceProcess("--tensor-parallel-size", "2") as service:
        yield service


@pytest.mark.parametrize("block", all_commands("serve"))
def test_a_service_of_the_pages_becomes_ready(block: str, environment: dict[str, str]) -> None:
    with ServiceProcess(command=("bash", "-euc", f"exec {block}"), environment=environment) as service:
        assert "ryzanstein is ready" in service.stderr


@pytest.mark.skipif(not (ROOT / ".venv/.installed").exists(), reason="the suite runs outside of make's .venv")
@pytest.mark.parametrize("block", all_commands("other"))
def test_a_command_of_the_pages_does_what_it_says(
    block: str, service: ServiceProcess, environment: dict[str, str]
) -> None:
    tool = block.split()[0]
    if tool in ("free", "hostname", "openssl", "ss") and shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.replace(ADDRESS, service.url)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stdout.startswith('{"error"')


def test_no_command_is_forgotten() -> None:
    with_commands = {page.name for page in DOCS.glob("**/*.md") if "```bash\n" in page.read_text()}
    assert with_commands <= {*PAGES, *ELSEWHERE}
    assert [words for words in NOT_RUN if not any(block.startswith(words) for block in every_block())] == []


@pytest.mark.parametrize("block", all_commands("make"))
def test_make_knows_the_target(block: str) -> None:
    done = subprocess.run(["make", "--dry-run", *block.split()[1:]], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0


def test_every_option_is_in_the_guide_or_the_page_for_those_who_know_vllm() -> None:
    pages = (DOCS / "guide.md").read_text() + (DOCS / "from-vllm.md").read_text()
    options = [
        option for config in (EngineConfig, ServerConfig) for option in options_of(config)[config is EngineConfig :]
    ]
    assert [option.flag for option in options if f"{option.flag}" not in pages] == []


def test_every_option_of_the_checkpoint_and_bench_commands_is_in_the_guide() -> None:
    guide = (DOCS / "guide.md").read_text()
    flags = {option.flag for command in COMMANDS for option in command.options}
    flags |= {option.flag for command in BENCH_COMMANDS for option in command.options}
    assert sorted(flag for flag in flags if flag not in guide.replace("--no-", "--")) == []


def test_every_option_in_the_guide_is_one() -> None:
    configs = (EngineConfig, ServerConfig, *(command.config for command in (*COMMANDS, *BENCH_COMMANDS)))
    options = [option for config in configs for option in options_of(config)]
    known = {option.flag for option in options}
    known |= {f"--no-{option.flag[2:]}" for option in options if option.type is bool}
    written = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (DOCS / "guide.md").read_text()))
    of_other_programs = {"--shm-size"}  # docker
    assert written - known <= {"--config", "--help", "--json", "--verify"} | of_other_programs


def test_the_pages_name_the_metrics_that_are_served(service: ServiceProcess) -> None:
    service.complete(prompt="import ", max_tokens=2)
    service.wait_until_idle()
    served = set(re.findall(r"^# TYPE (ryzanstein_\w+) ", httpx.get(f"{service.url}/metrics").text, re.MULTILINE))
    assert names_in("metrics.md") == served
    assert names_in("guide.md") | names_in("from-vllm.md") <= served


def names_in(page: str) -> set[str]:
    names = re.findall(r"\bryzanstein_[a-z0-9_]*[a-z0-9]\b", (DOCS / page).read_text())
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
