"""`ryzanstein doctor` fails exactly where `ryzanstein serve` does, and says why before."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.protocol.config import EMBEDDED_MODEL
from tests.leftovers import Leftovers
from tests.service_process import ServiceProcess, wait_until

ROOT = Path(__file__).parents[2]
RYZANSTEIN = [sys.executable, "-P", "-m", "server"]


def run(command: str, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RYZANSTEIN, command, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=180,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the embedded model, to break."""
    return Path(shutil.copytree(EMBEDDED_MODEL, tmp_path / "model"))


def rewrite(path: Path, **changed: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def drop_a_tensor(model: Path) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)


def reshape_a_tensor(model: Path) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.zeros(5)
    save_file(tensors, path)


@dataclass(frozen=True)
class Broken:
    """A set-up that cannot serve: what is done to the model, what is asked for, and which check must tell."""

    check: str
    arguments: tuple[str, ...] = ()
    break_model: Callable[[Path], object] = bool


BROKEN = {
    "no such directory": Broken("config.json", (), shutil.rmtree),
    "an unknown architecture": Broken(
        "config.json", (), lambda model: rewrite(model / "config.json", architectures=["NobodyForCausalLM"])
    ),
    "heads that do not split": Broken("split", ("-tp", "3")),
    "positions that the model does not know": Broken("context", ("--max-model-len", "5000")),
    "a truncated weight file": Broken("weight files", (), truncate),
    "a missing tensor": Broken("tensors", ("-tp", "2"), drop_a_tensor),
    "a misshapen tensor": Broken("tensors", (), reshape_a_tensor),
    "no weights": Broken("weight files", (), lambda model: (model / "model.safetensors").unlink()),
    "no tokenizer": Broken("model files", (), lambda model: (model / "tokenizer.json").unlink()),
    "a broken tokenizer": Broken("tokenizer", (), lambda model: (model / "tokenizer.json").write_text("[]")),
    "a broken chat template": Broken(
        "chat template", (), lambda model: rewrite(model / "tokenizer_config.json", chat_template="{% for %}")
    ),
    "a sampling default that cannot be": Broken(
        "sampling defaults", (), lambda model: rewrite(model / "generation_config.json", temperature=-1)
    ),
    "an end of text that is no id": Broken(
        "end of text", (), lambda model: rewrite(model / "generation_config.json", eos_token_id="x")
    ),
    "a cache that holds no block": Broken("KV cache", ("--kv-cache-memory", "100")),
    "a context that does not fit the cache": Broken("KV cache", ("--num-kv-blocks", "2", "--max-model-len", "33")),
    "a cache that no memory holds": Broken("KV cache", ("--num-kv-blocks", "20000000")),
    "a cache of more memory than there is": Broken("KV cache", ("--kv-cache-memory", "100TiB")),
    "an API key file that is not there": Broken("API key and TLS", ("--api-key-file", "/no/such/file")),
    "an address that is none": Broken("port", ("--host", "256.1.1.1")),
}


QUICK = (  # one for each stage at which serving finds it; the others run with the slow tests
    "an unknown architecture",
    "heads that do not split",
    "a missing tensor",
    "a context that does not fit the cache",
    "an address that is none",
)


@pytest.mark.parametrize(
    "broken",
    [pytest.param(broken, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, broken in BROKEN.items()],
)
def test_what_cannot_be_served_fails_in_both_and_in_the_same_words(broken: Broken, model: Path) -> None:
    broken.break_model(model)
    arguments = (str(model), "--port", "0", *broken.arguments)
    served, examined = run("serve", *arguments), run("doctor", "--json", *arguments)
    assert (served.returncode, examined.returncode) == (2, 2), served.stderr + examined.stderr
    document = json.loads(examined.stdout)
    failures = [check for check in document["checks"] if check["status"] == "failure"]
    assert broken.check in [check["name"] for check in failures]
    assert document["would_serve"] is False
    (error,) = [line for line in served.stderr.splitlines() if "ryzanstein: error: " in line]
    assert error.partition("ryzanstein: error: ")[2] in " ".join(
        " ".join(check["detail"] for check in failures).split()
    )


def test_a_port_in_use_fails_in_both() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        served, examined = run("serve", "--port", port), run("doctor", "--port", port)
    assert (served.returncode, examined.returncode) == (2, 2)
    assert "  ✗ port " in examined.stdout
    assert examined.stdout.endswith("Serving would fail.\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there_fails_in_both() -> None:
    arguments = ("--port", "0", "--device", "cuda")
    served, examined = run("serve", *arguments), run("doctor", *arguments)
    assert (served.returncode, examined.returncode) == (2, 2)
    assert "--device cuda: rank needs CUDA device 0, and 0 are visible" in " ".join(examined.stdout.split())


def test_too_few_open_files_fail_in_both() -> None:
    limited = ["bash", "-c", 'ulimit -n 60 && exec "$@"', "bash", *RYZANSTEIN]
    served, examined = (
        subprocess.run([*limited, command, "--port", "0"], check=False, capture_output=True, timeout=180, text=True)
        for command in ("serve", "doctor")
    )
    problem = "only 60 files may be open (ulimit -n); serving takes at least 64"
    assert (served.returncode, examined.returncode) == (2, 2)
    assert served.stderr == f"ryzanstein: error: {problem}\n"
    assert problem in " ".join(examined.stdout.split())


def test_a_mistake_on_the_command_line_is_the_same_line_in_both() -> None:
    served, examined = run("serve", "--dtype", "int3"), run("doctor", "--dtype", "int3")
    assert (served.returncode, examined.returncode) == (2, 2)
    assert served.stderr == examined.stderr
    assert examined.stdout == ""


def test_what_can_be_served_with_warnings_serves(model: Path) -> None:
    (model / "generation_config.json").unlink()
    rewrite(model / "config.json", eos_token_id=None)
    rewrite(model / "tokenizer_config.json", chat_template=None, eos_token=None)
    arguments = (str(model), "--host", "0.0.0.0", "-tp", "2")
    with ServiceProcess(*arguments) as service:
        assert service.complete(prompt="import ", max_tokens=2)["text"]
    examined = run("doctor", "--json", *arguments, "--port", "0")
    assert examined.returncode == 0
    document = json.loads(examined.stdout)
    warnings = {check["name"] for check in document["checks"] if check["status"] == "warning"}
    assert {"end of text", "API key and TLS"} <= warnings
    assert document["would_serve"] is True


def test_the_embedded_model_passes_at_least_forty_checks(tell: Callable[[str], None]) -> None:
    began = time.monotonic()
    examined = run("doctor", "--json", "--port", "0", "-tp", "2")
    seconds = time.monotonic() - began
    document: dict[str, Any] = json.loads(examined.stdout)
    tell(f"doctor, embedded model on 2 ranks: {len(document['checks'])} checks in {seconds:.1f} s")
    assert examined.returncode == 0
    assert len({(check["section"], check["name"]) for check in document["checks"]}) == len(document["checks"]) >= 40
    assert document["totals"]["failure"] == 0
    assert sum(document["totals"].values()) == len(document["checks"])
    assert examined.stderr == ""


def test_verify_adds_its_checks(tell: Callable[[str], None]) -> None:
    examined = run("doctor", "--json", "--port", "0", "-tp", "2", "--verify")
    found = {check["name"]: check for check in json.loads(examined.stdout)["checks"] if check["section"] == "verify"}
    tell(f"doctor --verify: {found['same tokens']['detail']}; {found['same logprobs']['detail']}")
    assert [check["status"] for check in found.values()] == ["ok"] * 4
    assert examined.returncode == 0


def test_the_options_come_from_the_environment_too() -> None:
    examined = run("doctor", "--json", "--port", "0", environment={"RYZANSTEIN_TENSOR_PARALLEL_SIZE": "3"})
    assert examined.returncode == 2
    assert json.loads(examined.stdout)["tensor_parallel_size"] == 3


@pytest.fixture
def leftovers() -> Iterator[Leftovers]:
    with Leftovers() as leftovers:
        yield leftovers


@pytest.mark.parametrize(
    ("redirection", "code", "words"),
    [
        ("| head -n 1", 141, ""),
        (">/dev/full", 2, "ryzanstein: error: standard output: No space left on device\n"),
        (">&-", 2, "ryzanstein: error: standard output is closed\n"),
    ],
)
def test_an_output_that_takes_no_more_ends_the_doctor_in_order(
    redirection: str, code: int, words: str, leftovers: Leftovers
) -> None:
    script = f'"$@" doctor --port 0 {redirection}; exit "${{PIPESTATUS[0]}}"'
    ended = subprocess.run(
        ["bash", "-c", script, "bash", *RYZANSTEIN],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, **leftovers.environment},
    )
    assert (ended.returncode, ended.stderr) == (code, words)
    wait_until(lambda: list(leftovers.folder.iterdir()) == [], 10)


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGKILL"])
def test_an_interrupted_doctor_leaves_nothing(signal_name: str, leftovers: Leftovers) -> None:
    environment = {**os.environ, **leftovers.environment}
    process = subprocess.Popen(
        [*RYZANSTEIN, "doctor", "--port", "0", "-tp", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd=ROOT,
    )
    doctor = psutil.Process(process.pid)
    wait_until(lambda: len(doctor.children(recursive=True)) == 3, 60)  # the engine's checks and two ranks
    children = doctor.children(recursive=True)
    process.send_signal(signal.Signals[signal_name])
    assert process.wait(20) == {"SIGINT": 130, "SIGKILL": -9}[signal_name]
    wait_until(lambda: not any(is_alive(child) for child in children), 10)
    wait_until(lambda: list(leftovers.folder.iterdir()) == [], 10)


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
