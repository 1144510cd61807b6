"""The messages on docs/troubleshooting.md: the code can print each, and most are provoked here."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.protocol.config import EMBEDDED_MODEL
from tests.service_process import ServiceProcess, wait_until

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
FEWEST_LETTERS = 12  # of a text of the code, so that a message is known by it
FOREVER = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "timeout": 3.0}
KEYS = """
- {name: slow, key: sk-slow, requests_per_minute: 1}
- {name: single, key: sk-single, max_concurrent_requests: 1}
- {name: any, key: sk-any}
"""

# What is typed for each message about a start, in a folder that `a_folder_of_mistakes` fills.
AT_ONCE: dict[str, list[str]] = {
    "An option is not known": ["--tensor-parallel-sise", "2"],
    "A line of the options' file is not known": ["--config", "options.yaml"],
    "A value from the environment": [],
    "Two options contradict each other": ["--num-kv-blocks", "2", "--kv-cache-memory", "1GiB"],
    "The address is not this machine's": ["--host", "203.0.113.7", "--port", "8000"],
    "The port is taken": ["--port", "TAKEN"],
    "The model is not found": ["/srv/models/llama"],
    "It is no model": ["models/llama"],
    "The tokenizer is missing": ["models/llama"],
    "A quantized checkpoint": ["models/llama"],
    "Another architecture": ["models/llama"],
    "The number of ranks does not fit": ["--tensor-parallel-size", "3"],
    "The context is more than the model's": ["--max-model-len", "100000"],
    "The hub cannot be reached": ["org/name"],
    "Offline, and not downloaded": ["org/name", "--offline"],
    "The key's file is not understood": ["--api-key-file", "keys.yaml"],
    "The certificate cannot be read": ["--ssl-certfile", "no-certificate.pem"],
}
BY_THE_RANKS: dict[str, list[str]] = {
    "A weights file is cut short": ["models/llama"],
    "The context does not fit into the KV cache": ["--max-model-len", "64", "--num-kv-blocks", "2"],
    "Not enough memory for the KV cache": ["--kv-cache-memory", "100TiB"],
    "No GPU is seen": ["--device", "cuda"],
    "Batch invariance cannot be kept": ["--kernels", "torch", "--batch-invariant"],
}
# Runs the command line on each case, in a process of its own; what it imports is imported once.
RUN_EACH = """
import json, os, sys
from server import cli
for name, arguments, environment, expected in json.load(sys.stdin):
    if not os.fork():
        os.chdir(name)
        os.environ.update(environment)
        os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT), 2)
        try:
            code = cli.main(["serve", *arguments])
        except SystemExit as end:
            code = end.code
        os._exit(code)
    _, status = os.wait()
    assert os.waitstatus_to_exitcode(status) == expected, name
"""


def sections() -> dict[str, str]:
    """Return the text under each symptom."""
    return dict(re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", PAGE, re.DOTALL | re.MULTILINE))


def messages() -> list[tuple[str, str]]:
    """Return each symptom with each of its messages."""
    return [
        (symptom, message)
        for symptom, text in sections().items()
        for message in re.findall(r"```text\n(.*?)\n```", text, re.DOTALL)
    ]


def pattern(message: str) -> re.Pattern[str]:
    return re.compile(".+?".join(re.escape(part) for part in message.split("…")))


def messages_of(symptom: str) -> list[re.Pattern[str]]:
    return [pattern(message) for its_symptom, message in messages() if its_symptom == symptom]


# --- what the code can print -----------------------------------------------------------------------------------------


def texts_of(tree: ast.AST) -> Iterator[list[str]]:
    """Yield the fixed parts of each text in a source, split where something is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = re.sub(r"%(\.\d+)?[sdgfr]|\{\w+\}", "\0", node.value).replace("%%", "%")
        else:
            continue
        yield text.split("\0")


@pytest.fixture(scope="module")
def texts() -> list[list[str]]:
    """All texts of the code with enough letters."""
    sources = [path for package in ("engine", "server") for path in (ROOT / package).rglob("*.py")]
    found = [parts for path in sources for parts in texts_of(ast.parse(path.read_text()))]
    return [parts for parts in found if sum(map(len, parts)) >= FEWEST_LETTERS]


@pytest.mark.parametrize(("symptom", "message"), messages())
def test_the_code_has_the_text_of_each_message(symptom: str, message: str, texts: list[list[str]]) -> None:
    printed = message.replace("…", "\ufffd")
    assert any(
        re.search(".+?".join(re.escape(part) for part in parts), printed) for parts in texts if "".join(parts).strip()
    ), symptom


def test_at_least_25_symptoms_have_a_message_and_each_has_something_to_look_at() -> None:
    assert len({symptom for symptom, _ in messages()}) >= 25
    assert [symptom for symptom, text in sections().items() if "```bash" not in text] == []


# --- starts ----------------------------------------------------------------------------------------------------------


def copy_model(directory: Path, **changed: Any) -> Path:
    shutil.copytree(EMBEDDED_MODEL, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changed))
    return directory


def make_mistake(symptom: str, folder: Path) -> None:
    """Put into `folder` what the symptom needs."""
    model = folder / "models" / "llama"
    folder.mkdir()
    if symptom == "A line of the options' file is not known":
        (folder / "options.yaml").write_text("tensor-paralel-size: 2\n")
    elif symptom == "It is no model":
        model.mkdir(parents=True)
    elif symptom == "The tokenizer is missing":
        (copy_model(model) / "tokenizer.json").unlink()
    elif symptom == "A quantized checkpoint":
        copy_model(model, quantization_config={"quant_method": "gptq"})
    elif symptom == "Another architecture":
        copy_model(model, architectures=["GemmaForCausalLM"])
    elif symptom == "A weights file is cut short":
        os.truncate(copy_model(model) / "model.safetensors", 1_000_000)
    elif symptom == "The key's file is not understood":
        (folder / "keys.yaml").write_text("- {name: a, key: sk-1}\n- {name: a, key: sk-2}\n")


def environment_of(symptom: str, folder: Path) -> dict[str, str]:
    port = "eighty" if symptom == "A value from the environment" else "0"
    hub = {"HF_HOME": str(folder), "HF_ENDPOINT": "http://127.0.0.1:9"}
    return {"RYZANSTEIN_PORT": port, "CUDA_VISIBLE_DEVICES": "", **hub}


def provoke(cases: dict[str, list[str]], folder: Path, port: str) -> dict[str, str]:
    """Return what `serve` prints in each case; it must end with code 2, or with 1 where another try may go well."""
    prepared = []
    for number, (symptom, arguments) in enumerate(cases.items()):
        place = folder / str(number)
        make_mistake(symptom, place)
        own = [port if argument == "TAKEN" else argument for argument in arguments]
        code = 1 if symptom == "The hub cannot be reached" else 2
        prepared.append((str(place), own, environment_of(symptom, place), code))
    subprocess.run(
        [sys.executable, "-c", RUN_EACH], input=json.dumps(prepared), text=True, cwd=ROOT, check=True, timeout=280
    )
    printed = [(Path(place) / "stderr").read_text() for place, *_ in prepared]
    return dict(
        zip(cases, (text.replace(f":{port}", ":8000").replace(f" {port}", " 8000") for text in printed), strict=True)
    )


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory, service: ServiceProcess) -> dict[str, str]:
    """What starts print that fail before a rank does anything."""
    return provoke(AT_ONCE, tmp_path_factory.mktemp("mistakes") / "", service.url.rsplit(":", 1)[1])


@pytest.mark.parametrize("symptom", AT_ONCE)
def test_a_start_that_fails_prints_the_message(symptom: str, starts: dict[str, str]) -> None:
    (message,) = messages_of(symptom)
    assert message.search(starts[symptom]), starts[symptom]


@pytest.mark.slow
@pytest.mark.parametrize("symptom", BY_THE_RANKS)
def test_a_start_whose_ranks_fail_prints_the_message(symptom: str, tmp_path: Path) -> None:
    (message,) = messages_of(symptom)
    printed = provoke({symptom: BY_THE_RANKS[symptom]}, tmp_path, "8000")[symptom]
    assert message.search(printed), printed


@pytest.mark.slow
def test_a_changed_byte_is_found_with_the_message(tmp_path: Path) -> None:
    checkpoint = tmp_path / "on-2"
    command = [sys.executable, "-P", "-m", "server", "checkpoint"]
    subprocess.run(
        [*command, "shard", str(EMBEDDED_MODEL), str(checkpoint), "--tensor-parallel-size", "2"], cwd=ROOT, check=True
    )
    weights = checkpoint / "weights_rank0.safetensors"
    with weights.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    done = subprocess.run([*command, "verify", str(checkpoint)], cwd=ROOT, capture_output=True, text=True, check=False)
    (message,) = messages_of("A file's bytes have changed")
    printed = (done.stdout + done.stderr).replace(str(checkpoint), "models/llama-on-2")
    assert message.search(printed), printed


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys.write_text(KEYS)
    bounds = ("--max-num-seqs", "1", "--max-queued-requests", "1")
    with ServiceProcess(*bounds, "--api-key-file", str(keys)) as service:
        yield service


def ask(service: ServiceProcess, body: Any, key: str = "sk-any", path: str = "/v1/completions") -> str:
    """Return the message of the refusal of a request, or nothing."""
    content = body if isinstance(body, bytes) else json.dumps(body)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    answer = httpx.post(f"{service.url}{path}", content=content, headers=headers, timeout=60)
    return str(answer.json().get("error", {}).get("message", ""))


def several(service: ServiceProcess, key: str, count: int) -> str:
    """Send requests at once, and return all refusals."""
    with ThreadPoolExecutor(count) as threads:
        return "\n".join(threads.map(lambda _: ask(service, FOREVER, key), range(count)))


REFUSALS: dict[str, Callable[[ServiceProcess], str]] = {
    "401: no key": lambda service: ask(service, {"prompt": "a"}, key="wrong"),
    "404: no such address": lambda service: ask(service, {}, path="/v1/chat/completion"),
    "404: another model": lambda service: ask(service, {"prompt": "a", "model": "gpt-4"}),
    "400: a field that is not known": lambda service: ask(service, {"prompt": "a", "nonsense": 1}),
    "400: a field that is not supported": lambda service: ask(service, {"prompt": "a", "suffix": "b"}),
    "400: the context is too short": lambda service: ask(service, {"prompt": "a", "max_tokens": 100_000}),
    "413: too large": lambda service: ask(service, b"a" * 17_000_000),
    "429: the key's limits": lambda service: several(service, "sk-single", 2) + several(service, "sk-slow", 2),
    "429: the queue is full": lambda service: several(service, "sk-any", 6),
    "504: out of time": lambda service: ask(service, FOREVER | {"timeout": 0.001}),
}


@pytest.mark.parametrize("symptom", REFUSALS)
def test_a_refused_request_gets_the_message(symptom: str, service: ServiceProcess) -> None:
    refusals = REFUSALS[symptom](service)
    assert [message.pattern for message in messages_of(symptom) if not message.search(refusals)] == [], refusals


def test_a_stream_that_is_not_kept_gets_the_message(service: ServiceProcess) -> None:
    headers = {"Authorization": "Bearer sk-any"}
    answer = httpx.get(f"{service.url}/v1/streams/nope", headers=headers).json()["error"]["message"]
    (message,) = messages_of("The rest of a stream is gone")
    assert message.search(answer), answer


def is_followed(message: re.Pattern[str], stderr: str) -> bool:
    """Whether a loss was logged, of whatever epoch, and then that others took over."""
    found = re.search(message.pattern.replace("epoch\\ 1", r"epoch\ \d+"), stderr)
    return found is not None and re.search(r"epoch \d+ is ready", stderr[found.end() :]) is not None


def test_a_killed_rank_is_logged_with_its_message(service: ServiceProcess) -> None:
    (killed,) = messages_of("A rank was killed")
    os.kill(service.rank_pids()[0], signal.SIGKILL)
    wait_until(lambda: is_followed(killed, service.stderr), 60)


def test_a_stopped_rank_is_logged_with_its_message() -> None:
    with ServiceProcess("--rank-timeout", "1") as service:
        stopped, _ = messages_of("A rank hangs")
        os.kill(service.rank_pids()[0], signal.SIGSTOP)
        wait_until(lambda: is_followed(stopped, service.stderr), 60)


def test_an_end_is_logged_and_told_with_its_messages(service: ServiceProcess) -> None:
    (logged,), (told,) = messages_of("Answers are cut when the service is stopped"), messages_of("503: it is ending")
    headers = {"Authorization": "Bearer sk-any"}
    body = FOREVER | {"stream": True, "timeout": 60, "n": 4}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, headers=headers, timeout=60) as stream:
        lines = stream.iter_lines()  # as long as it is held, the connection is
        assert next(lines) == "id: 1", service.stderr
        service.process.terminate()
        wait_until(lambda: bool(logged.search(service.stderr)), 30)
        assert told.search(ask(service, FOREVER))
