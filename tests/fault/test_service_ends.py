"""How the service ends: by a death, a mistake, or when asked. Nothing is left of it, and nobody is left waiting."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tokenizers import Tokenizer, normalizers

from engine.protocol.config import EMBEDDED_MODEL
from server.supervisor import MAX_VAIN_RESTARTS
from tests.leftovers import Leftovers
from tests.service_process import ServiceProcess, wait_until

LONG = {"prompt": "def f(", "max_tokens": 900, "ignore_eos": True, "stream": True}


AT_ONCE = 5.0  # seconds
WITHOUT_DRAINING = ("--drain-timeout", "0")
SERVE = [sys.executable, "-P", "-m", "server", "serve"]


@pytest.fixture
def leftovers() -> Iterator[Leftovers]:
    with Leftovers() as leftovers:
        yield leftovers


def run_serve(leftovers: Leftovers, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Start a service that must not start, and check that it left nothing."""
    result = subprocess.run(
        [*SERVE, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **leftovers.environment},
    )
    leftovers.check([])
    return result


def error_lines(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if "ryzanstein: error:" in line]


class OpenStream(threading.Thread):
    """A client in the middle of a streamed answer."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self.has_begun = threading.Event()
        self.events: list[str] = []
        self.ended_at = 0.0

    def run(self) -> None:
        with httpx.stream("POST", f"{self._url}/v1/completions", json=LONG, timeout=60) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line.removeprefix("data: "))
                    self.has_begun.set()
        self.ended_at = time.monotonic()


class OpenRequest(threading.Thread):
    """A client that waits for a whole answer."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self.response: httpx.Response | None = None

    def run(self) -> None:
        self.response = httpx.post(f"{self._url}/v1/completions", json={**LONG, "stream": False}, timeout=60)


def open_clients(service: ServiceProcess) -> tuple[list[OpenStream], OpenRequest]:
    streams, waiting = [OpenStream(service.url) for _ in range(8)], OpenRequest(service.url)
    waiting.start()
    for stream in streams:
        stream.start()
    for stream in streams:
        assert stream.has_begun.wait(60)
    wait_until(lambda: service.metric("ryzanstein_time_to_first_token_seconds_count") == len(streams) + 1, 60)
    return streams, waiting


def check_clients_got_an_error(streams: list[OpenStream], waiting: OpenRequest, message: str) -> None:
    for stream in streams:
        stream.join(20)
        assert message in json.loads(stream.events[-1])["error"]["message"]
    waiting.join(20)
    assert waiting.response is not None
    assert waiting.response.status_code == 500
    assert message in waiting.response.json()["error"]["message"]


def test_a_service_whose_ranks_die_again_and_again_ends_with_the_cause(leftovers: Leftovers) -> None:
    with ServiceProcess(environment=leftovers.environment) as service:
        processes = service.descendants()
        for epoch in range(2, 3 + MAX_VAIN_RESTARTS):
            os.kill(service.rank_pids()[0], signal.SIGKILL)
            wait_until(partial(is_ready, service, epoch), 60)
        last = service.rank_pids()[0]
        os.kill(last, signal.SIGKILL)
        assert service.process.wait(20) == 1
        leftovers.check(processes)
    (error,) = [line for line in service.stderr.splitlines() if "ryzanstein: error:" in line]
    assert f"rank 0 (pid {last}) was killed by SIGKILL" in error
    assert "restarts in a row" in error
    assert "Traceback" not in service.stderr


def is_ready(service: ServiceProcess, epoch: int) -> bool:
    answer = httpx.get(f"{service.url}/ready")
    return answer.status_code == 200 and bool(answer.json()["epoch"] == epoch)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_at_once_where_requests_get_no_time(
    number: signal.Signals, leftovers: Leftovers
) -> None:
    with ServiceProcess("-tp", "2", *WITHOUT_DRAINING, environment=leftovers.environment) as service:
        processes = service.descendants()
        streams, waiting = open_clients(service)
        started = time.monotonic()
        service.process.send_signal(number)
        assert service.process.wait(20) == 0
        assert time.monotonic() - started < AT_ONCE
        check_clients_got_an_error(streams, waiting, "shutting down")
        leftovers.check(processes)


def test_a_signal_while_loading_ends_everything(leftovers: Leftovers) -> None:
    process = subprocess.Popen(
        [*SERVE, "-tp", "2", "--port", "0"],
        stderr=subprocess.DEVNULL,
        env={**os.environ, **leftovers.environment},
    )
    deadline = time.monotonic() + 60
    while len(processes := psutil.Process(process.pid).children(recursive=True)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    assert process.wait(20) == 0
    leftovers.check(processes)


def send_stop_signals(process: "subprocess.Popen[Any]") -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        time.sleep(0.05)


def test_impatient_signals_do_not_change_the_exit_code(leftovers: Leftovers) -> None:
    with ServiceProcess("--tensor-parallel-size", "2", environment=leftovers.environment) as service:
        processes = service.descendants()
        send_stop_signals(service.process)
        assert service.process.wait(20) == 0
        leftovers.check(processes)
    assert "Traceback" not in service.stderr


def test_impatient_signals_while_loading_do_not_change_the_exit_code(leftovers: Leftovers) -> None:
    environment = {**os.environ, **leftovers.environment}
    with subprocess.Popen([*SERVE, "--port", "0"], stderr=subprocess.PIPE, text=True, env=environment) as process:
        wait_until(lambda: len(psutil.Process(process.pid).children(recursive=True)) >= 1, 60)
        processes = psutil.Process(process.pid).children(recursive=True)
        send_stop_signals(process)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert errors == ""
    leftovers.check(processes)


def test_prompts_being_tokenized_do_not_delay_the_end(tmp_path: Path, leftovers: Leftovers) -> None:
    directory = copy_of_the_embedded_model(tmp_path)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()  # so that only the tokens tell a text's length
    tokenizer.save(str(directory / "tokenizer.json"))
    body = json.dumps({"prompt": "ab 1\n" * 1_000_000}).encode()
    answers: list[httpx.Response] = []
    sent: list[bool] = []

    def ask() -> None:
        def content() -> Iterator[bytes]:
            yield body
            sent.append(True)

        headers = {"content-type": "application/json"}
        url = f"{service.url}/v1/completions"
        answers.append(httpx.post(url, content=content(), headers=headers, timeout=60))

    with ServiceProcess(str(directory), *WITHOUT_DRAINING, environment=leftovers.environment) as service:
        processes = service.descendants()
        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(sent) == len(threads), 60)
        time.sleep(1)
        assert httpx.get(f"{service.url}/health").status_code == 200
        assert answers == []
        started = time.monotonic()
        service.process.terminate()
        assert service.process.wait(20) == 0
        assert time.monotonic() - started < AT_ONCE
        leftovers.check(processes)
        for thread in threads:
            thread.join(10)
    assert [answer.status_code for answer in answers] == [503] * len(threads)
    assert "Traceback" not in service.stderr


def test_a_killed_server_takes_its_ranks_and_its_folder_along(leftovers: Leftovers) -> None:
    with ServiceProcess("--tensor-parallel-size", "2", environment=leftovers.environment) as service:
        processes = service.descendants()
        service.process.kill()
        service.process.wait()
        leftovers.check(processes)


def copy_of_the_embedded_model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED_MODEL, tmp_path / "copy"))


def test_a_stream_that_nobody_reads_does_not_delay_the_end(leftovers: Leftovers) -> None:
    body = json.dumps({**LONG, "n": 64})
    request = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    with (
        ServiceProcess(*WITHOUT_DRAINING, environment=leftovers.environment) as service,
        socket.socket() as connection,
    ):
        processes = service.descendants()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(service.url.rsplit(":", 1)[1])))
        connection.sendall(f"{request}content-type: application/json\r\n\r\n{body}".encode())
        assert connection.recv(64)
        wait_until(lambda: service.metric("ryzanstein_generation_tokens_total") > 64 * 50, 120)
        started = time.monotonic()
        service.process.terminate()
        assert service.process.wait(20) == 0
        assert time.monotonic() - started < AT_ONCE
        leftovers.check(processes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("/nowhere",), "/nowhere is not a directory"),
        (("-tp", "3"), "--tensor-parallel-size 3 does not divide the model's 8 attention heads"),
        (("--max-model-len", "2000"), "--max-model-len 2000 is more than the model's max_position_embeddings, 1024"),
        (("--num-kv-blocks", "4", "--max-model-len", "100"), "--max-model-len 100 does not fit"),
        (("--dtype", "float8"), "--dtype"),
        (("--nonsense",), "--nonsense"),
        (("--device", "cuda"), "--device cuda"),
    ],
)
def test_a_mistake_ends_in_one_line_and_exit_code_2(
    arguments: tuple[str, ...], message: str, leftovers: Leftovers
) -> None:
    result = run_serve(leftovers, "--port", "0", *arguments)
    assert result.returncode == 2
    assert len(error_lines(result)) == 1
    assert message in error_lines(result)[0]
    assert "Traceback" not in result.stderr


def test_a_folder_that_lacks_files_ends_in_a_line_that_names_the_first(tmp_path: Path, leftovers: Leftovers) -> None:
    for name in ("config.json", "tokenizer.json"):
        result = run_serve(leftovers, str(tmp_path), "--port", "0")
        assert result.returncode == 2
        assert f"has no {name}" in error_lines(result)[0]
        shutil.copy(EMBEDDED_MODEL / name, tmp_path)


def test_a_broken_chat_template_ends_in_one_line_and_exit_code_2(tmp_path: Path, leftovers: Leftovers) -> None:
    template = tmp_path / "template"
    template.write_text("{% for %}")
    result = run_serve(leftovers, "--chat-template", str(template), "--port", "0")
    assert result.returncode == 2
    assert "chat template" in error_lines(result)[0]


def test_a_folder_without_weights_ends_in_one_line_and_exit_code_2(tmp_path: Path, leftovers: Leftovers) -> None:
    directory = copy_of_the_embedded_model(tmp_path)
    (directory / "model.safetensors").unlink()
    result = run_serve(leftovers, str(directory), "--port", "0")
    assert result.returncode == 2
    assert len(error_lines(result)) == 1
    assert "model.safetensors" in error_lines(result)[0]


def test_a_truncated_weights_file_is_named_once_whatever_the_number_of_ranks(
    tmp_path: Path, leftovers: Leftovers
) -> None:
    directory = copy_of_the_embedded_model(tmp_path)
    os.truncate(directory / "model.safetensors", 100_000)
    result = run_serve(leftovers, str(directory), "--port", "0", "-tp", "4")
    assert result.returncode == 2
    assert len(error_lines(result)) == 1
    assert "model.safetensors" in error_lines(result)[0]


def test_a_port_in_use_ends_in_one_line_and_exit_code_2(leftovers: Leftovers) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        result = run_serve(leftovers, "--port", str(port))
    assert result.returncode == 2
    assert error_lines(result) == [
        f"ryzanstein: error: --port {port}: cannot listen on 127.0.0.1:{port}: Address already in use"
    ]
