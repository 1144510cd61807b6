"""Starting, failing and ending: exit codes, one clear line, and nothing left behind."""

import json
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

from engine.protocol.config import EMBEDDED_MODEL
from tests.e2e.server_process import ServerProcess, fails, serve, shared_memory

SMALL = ("--num-kv-blocks", "128")


class OpenStream(threading.Thread):
    """A stream that is being read; `lines` holds what came."""

    def __init__(self, server: ServerProcess, **body: object) -> None:
        super().__init__()
        self._url = f"{server.url}/v1/completions"
        self._body = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True, **body}
        self.begun = threading.Event()
        self.lines: list[str] = []
        self.status = 0
        self.start()
        assert self.begun.wait(60)

    def run(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=120) as response:
            self.status = response.status_code
            for line in response.iter_lines():
                if line:
                    self.lines.append(line.removeprefix("data: "))
                self.begun.set()

    def error(self) -> str:
        """Wait for the end and return the error event's message."""
        self.join(30)
        assert not self.is_alive()
        errors = [json.loads(line)["error"] for line in self.lines if line.startswith('{"error"')]
        assert len(errors) == 1
        assert self.lines[-1].startswith('{"error"')
        message: str = errors[0]["message"]
        return message


class WholeAnswer(threading.Thread):
    """A request that waits for its whole answer."""

    def __init__(self, server: ServerProcess) -> None:
        super().__init__()
        self._server = server
        self.response: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self.response = self._server.post("/v1/completions", prompt="x", max_tokens=900, ignore_eos=True)

    def status(self) -> int:
        self.join(30)
        assert self.response is not None
        assert "message" in self.response.json()["error"]
        return self.response.status_code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_within_five_seconds(number: signal.Signals) -> None:
    memory = shared_memory()
    with serve("-tp", "2", *SMALL) as server:
        stream, whole = OpenStream(server), WholeAnswer(server)
        time.sleep(0.3)
        begin = time.monotonic()
        server.process.send_signal(number)
        assert server.process.wait(10) == 0
        assert time.monotonic() - begin < 5
        assert "shutting down" in stream.error()
        assert whole.status() == 500
        assert server.survivors() == []
        assert server.run_dirs == []
    assert shared_memory() <= memory


def test_a_stream_that_nobody_reads_does_not_delay_the_end() -> None:
    with serve(*SMALL) as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "x", "max_tokens": 900, "ignore_eos": True, "n": 64, "stream": True})
        with socket.create_connection((host, int(port))) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
            connection.sendall(f"{head}content-type: application/json\r\n\r\n{body}".encode())
            assert connection.recv(64)
            time.sleep(2)
            begin = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(10) == 0
            assert time.monotonic() - begin < 5
        assert server.survivors() == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_every_request_and_the_service_with_an_error(rank: int) -> None:
    memory = shared_memory()
    with serve("-tp", "2", *SMALL) as server:
        pid = httpx.get(f"{server.url}/ready").json()["ranks"][rank]["pid"]
        stream, whole = OpenStream(server), WholeAnswer(server)
        time.sleep(0.3)
        begin = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        assert server.process.wait(10) == 1
        assert time.monotonic() - begin < 10
        assert f"rank {rank} (pid {pid}) was killed by SIGKILL" in stream.error()
        assert whole.status() == 500
        assert server.survivors() == []
        assert server.run_dirs == []
        assert server.log.splitlines()[-1].startswith("ryzanstein: error: rank")
    assert shared_memory() <= memory


def test_a_killed_orchestrator_takes_the_ranks_and_the_service_with_it() -> None:
    with serve("-tp", "2", *SMALL) as server:
        stream = OpenStream(server)
        (orchestrator,) = (process for process in server.tree() if process.ppid() == server.process.pid)
        orchestrator.kill()
        assert server.process.wait(10) == 1
        assert "orchestrator was killed" in stream.error()
        assert server.survivors() == []


def test_a_killed_server_takes_everything_with_it() -> None:
    with serve("-tp", "2", *SMALL) as server:
        server.process.kill()
        server.process.wait()
        assert server.survivors(5) == []
        assert server.run_dirs == []


def test_a_signal_during_the_start_ends_everything() -> None:
    server = ServerProcess(*SMALL)
    try:
        time.sleep(1.0)
        server.tree()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0
        assert server.survivors() == []
        assert server.run_dirs == []
    finally:
        server.close()


def line_of(arguments: list[str]) -> str:
    """Return the one line that a start which must fail writes."""
    code, output = fails(*arguments)
    assert code == 2
    (line,) = output.splitlines()
    assert line.startswith("ryzanstein: error: ")
    return line


def test_a_port_in_use_is_one_line_and_exit_code_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: cannot listen on 127.0.0.1:{port}: Address already in use" in line_of(
            ["--port", str(port)]
        )


def test_a_bad_model_directory_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    assert "is not a directory" in line_of([str(tmp_path / "none"), "--port", "0"])
    assert "has no config.json" in line_of([str(tmp_path), "--port", "0"])
    shutil.copy(EMBEDDED_MODEL / "config.json", tmp_path)
    assert "has no tokenizer.json" in line_of([str(tmp_path), "--port", "0"])
    shutil.copy(EMBEDDED_MODEL / "tokenizer.json", tmp_path)
    assert str(tmp_path) in line_of([str(tmp_path), "--port", "0"])  # no weights: what the ranks say


def test_an_impossible_split_is_one_line_and_exit_code_2() -> None:
    assert "--tensor-parallel-size 3 does not divide" in line_of(["-tp", "3", "--port", "0"])


def test_a_context_that_does_not_fit_is_one_line_and_exit_code_2() -> None:
    assert "--max-model-len" in line_of(["--max-model-len", "1000000", "--port", "0"])


def test_a_broken_chat_template_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "template").write_text("{% for %}")
    assert "chat template" in line_of(["--chat-template", str(tmp_path / "template"), "--port", "0"])
