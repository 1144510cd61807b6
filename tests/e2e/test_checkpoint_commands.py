"""`ryzanstein checkpoint …` as a person or a script runs it."""

import contextlib
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import psutil
import pytest
import torch

from engine.checkpoint.metadata import CheckpointMetadata
from engine.checkpoint.targets import targets_of
from engine.checkpoint.tensor_header import make_header
from engine.communication.handler import CommunicationHandler
from engine.models.registry import build_model
from engine.protocol.config import EMBEDDED_MODEL
from engine.protocol.environment import PARENT_PID_VARIABLE
from engine.protocol.model_config import ModelConfig
from tests.hub import Hub, Repository, files_of
from tests.service_process import ServiceProcess, wait_until
from tests.terminal import Terminal

ROOT = Path(__file__).parents[2]
CHECKPOINT = [sys.executable, "-P", "-m", "server", "checkpoint"]
ONLY_ROOT_OF_ITS_OWN = ["unshare", "--map-root-user", "--mount"]
CAN_MOUNT = (
    shutil.which("unshare") is not None
    and subprocess.run([*ONLY_ROOT_OF_ITS_OWN, "true"], check=False, capture_output=True).returncode == 0
)


def checkpoint(*arguments: str | Path, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*before, *CHECKPOINT, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=180, cwd=ROOT)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model on 2 ranks."""
    destination = tmp_path_factory.mktemp("sharded") / "model"
    done = checkpoint("shard", EMBEDDED_MODEL, destination, "-tp", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{destination}: 2 files for 2 ranks, 10.5 MiB, written in ")
    assert done.stderr == ""
    return destination


# --- what they do ----------------------------------------------------------------------------------------------------


def test_a_sharded_model_verifies_and_is_exported_again(sharded: Path, tmp_path: Path) -> None:
    verified = checkpoint("verify", sharded)
    assert verified.returncode == 0
    assert verified.stdout.startswith(f"{sharded}: no problem; 2 files, 10.5 MiB")
    exported = checkpoint("export", sharded, tmp_path / "again", "--max-file-size", "4MiB")
    assert exported.returncode == 0, exported.stderr
    assert exported.stdout.startswith(f"{tmp_path / 'again'}: 3 files as Hugging Face has them, 10.4 MiB")
    assert checkpoint("verify", tmp_path / "again").returncode == 0


def test_a_model_of_the_hub_is_downloaded_and_sharded_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Hub({"org/name": Repository({"main": files_of(EMBEDDED_MODEL)})}) as hub:
        for name, value in hub.environment(tmp_path / "hub").items():
            monkeypatch.setenv(name, value)
        refused = checkpoint("shard", "org/name", tmp_path / "sharded", "-tp", "3")
        assert (refused.returncode, "--tensor-parallel-size 3 does not divide" in refused.stderr) == (2, True)
        done = checkpoint("shard", "org/name", tmp_path / "sharded", "-tp", "2")
        assert done.returncode == 0, done.stderr
    assert CheckpointMetadata.read(tmp_path / "sharded").model_name == "org/name"
    assert checkpoint("verify", tmp_path / "sharded").returncode == 0


def test_what_was_sharded_is_served(sharded: Path) -> None:
    texts = []
    for model in (sharded, EMBEDDED_MODEL):
        with ServiceProcess(str(model), "--tensor-parallel-size", "2") as service:
            texts.append(service.complete(prompt="import ", max_tokens=8, temperature=0)["text"])
    assert texts[0] == texts[1] != ""


def test_inspect_shows_a_table_and_all_of_it_as_json(sharded: Path) -> None:
    shown = checkpoint("inspect", sharded)
    assert shown.returncode == 0
    assert "cut for      2 ranks\nloads on     1, 2, 4, 8 ranks\n" in shown.stdout
    assert "  model.layers.0 … 5\n" in shown.stdout
    document = json.loads(checkpoint("inspect", sharded, "--json").stdout)
    assert len(document["tensors"]) == 1 + 6 * 6 + 1
    assert document["tensor_parallel_sizes"] == [1, 2, 4, 8]
    assert [file["rank"] for file in document["files"]] == [0, 1]


def test_verify_lists_what_is_wrong_and_says_so_in_its_exit_code(sharded: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(sharded, tmp_path / "broken"))
    os.truncate(broken / "weights_rank0.safetensors", 5)
    (broken / "weights_rank1.safetensors").unlink()
    shown = checkpoint("verify", broken)
    assert shown.returncode == 2
    first, second, *_ = shown.stdout.splitlines()
    assert first.startswith(f"problem: {broken}/weights_rank0.safetensors: has 5 bytes, but metadata.json says ")
    assert second.startswith(f"problem: {broken}/weights_rank1.safetensors: is missing")
    assert shown.stderr == ""
    document = checkpoint("verify", broken, "--json")
    assert document.returncode == 2
    assert json.loads(document.stdout)["is_whole"] is False
    assert len(json.loads(document.stdout)["problems"]) == 2


@pytest.mark.slow
def test_no_progress_is_silence(tmp_path: Path) -> None:
    done = checkpoint("shard", EMBEDDED_MODEL, tmp_path / "sharded", "--no-progress")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("", "the following arguments are required: COMMAND (see ryzanstein checkpoint --help)"),
        ("shard a", "the following arguments are required: DST (see ryzanstein checkpoint shard --help)"),
        ("verify a --fast", "unrecognized arguments: --fast (see ryzanstein checkpoint verify --help)"),
        ("shard a b -tp 0", "--tensor-parallel-size must be between 1 and 2147483647, not 0 (command line)"),
        (
            "shard a b --dtype int8",
            "--dtype must be one of auto, float32, bfloat16, float16, not 'int8' (command line)",
        ),
        ("export a b --max-file-size 1k", "--max-file-size must be at least 1048576 bytes, not 1024 (command line)"),
        ("shard ./none b", "model: none is not a directory"),
        ("inspect ./none", "model: none is not a directory"),
        ("verify .", "model: . has neither config.json nor metadata.json, nor any model-step-N in it"),
        (
            "shard engine/embedded/model b -tp 3",
            "--tensor-parallel-size 3 does not divide the model's 8 attention heads; possible: 1, 2, 4, 8",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: str, error: str) -> None:
    done = checkpoint(*words.split())
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"ryzanstein: error: {error}\n")


@pytest.mark.parametrize("command", ["shard", "inspect", "verify", "export"])
def test_help_tells_of_every_option_and_exit_code(command: str) -> None:
    done = checkpoint(command, "--help")
    assert done.returncode == 0
    assert f"usage: ryzanstein checkpoint {command} " in done.stdout
    assert "Exit code: 0" in done.stdout
    assert "RYZANSTEIN_" not in done.stdout  # what is written follows from the command line alone


@pytest.mark.slow
def test_variables_of_a_service_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RYZANSTEIN_TENSOR_PARALLEL_SIZE", "4")
    monkeypatch.setenv("RYZANSTEIN_DTYPE", "float32")
    assert checkpoint("shard", EMBEDDED_MODEL, tmp_path / "sharded").returncode == 0
    metadata = CheckpointMetadata.read(tmp_path / "sharded")
    assert (metadata.tp_size, metadata.dtype) == (1, "bfloat16")


def test_an_output_that_nobody_reads_is_no_error(sharded: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [*CHECKPOINT, "inspect", str(sharded)]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, check=False, timeout=180, cwd=ROOT)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.slow
@pytest.mark.parametrize(("closed", "code"), [(">&-", 2), ("2>&-", 0)])
def test_an_output_that_is_closed_is_one_and_closed_errors_are_none(sharded: Path, closed: str, code: int) -> None:
    command = shlex.join([*CHECKPOINT, "verify", str(sharded)])
    done = subprocess.run(["sh", "-c", f"{command} {closed}"], check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code
    assert done.stderr == ("ryzanstein: error: standard output is closed\n" if code else "")


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "code"), [(HTTPStatus.SERVICE_UNAVAILABLE, 1), (HTTPStatus.NOT_FOUND, 2)])
def test_a_hub_out_of_order_is_no_mistake_and_a_name_that_it_does_not_know_is(
    answer: HTTPStatus, code: int, tmp_path: Path
) -> None:
    with Hub({}, refuses_with=answer, refusal="RepoNotFound" if code == 2 else "") as hub:
        variables = [f"{name}={value}" for name, value in hub.environment(tmp_path / "hub").items()]
        done = checkpoint("shard", "org/name", tmp_path / "out", "-tp", "2", before=("env", *variables))
    assert done.returncode == code, done.stderr


def test_an_output_that_takes_no_more_is_one(sharded: Path) -> None:
    command = [*CHECKPOINT, "inspect", str(sharded)]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False, timeout=180, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == b"ryzanstein: error: standard output: No space left on device\n"


# --- terminals -------------------------------------------------------------------------------------------------------


def on_terminal(*arguments: str | Path, columns: int = 100) -> Terminal:
    """Run a command on a terminal, and return what it left there."""
    with Terminal(columns) as terminal:
        command = [*CHECKPOINT, *map(str, arguments)]
        done = subprocess.run(command, stdout=terminal.end, stderr=terminal.end, check=False, timeout=180, cwd=ROOT)
        assert done.returncode == 0
    return terminal


@pytest.mark.slow
def test_a_bar_shows_how_far_it_has_come_and_goes_away(sharded: Path, tmp_path: Path) -> None:
    terminal = on_terminal("shard", sharded, tmp_path / "sharded", "-tp", "4")
    assert "writing:" in terminal.written
    assert "%|" in terminal.written
    (line,) = [line for line in terminal.screen if line]
    assert line.startswith(f"{tmp_path / 'sharded'}"[:90])
    assert "%|" in on_terminal("verify", sharded).written
    assert "%|" not in on_terminal("verify", sharded, "--no-progress").written


@pytest.mark.slow
@pytest.mark.parametrize("columns", [60, 100])
def test_a_table_is_no_wider_than_the_terminal(sharded: Path, columns: int) -> None:
    lines = on_terminal("inspect", sharded, columns=columns).screen
    table = [line for line in lines if not line.startswith(str(sharded))]
    assert max(map(len, table)) <= columns
    assert "    self_attn.qkv_proj.weight" in [line[:29] for line in table]


# --- disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not CAN_MOUNT, reason="needs a mount namespace")
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("size=2m", "out: 10.7 MiB are to be written, and its disk has room for 2.0 MiB"),
        ("size=20m,nr_inodes=3", "out: cannot be written: No space left on device"),
        ("ro", "out: cannot be written: Read-only file system"),
    ],
)
def test_a_disk_that_is_full_or_read_only_is_one_line(tmp_path: Path, options: str, error: str) -> None:
    script = f'mount -t tmpfs -o {options} tmpfs "$0" && "$@"; code=$?; ls -A "$0"; exit $code'
    before = (*ONLY_ROOT_OF_ITS_OWN, "sh", "-c", script, str(tmp_path))
    done = checkpoint("shard", EMBEDDED_MODEL, tmp_path / "out", "-tp", "2", before=before)
    assert (done.returncode, done.stdout) == (2, "")  # and nothing is left on it
    assert done.stderr == f"ryzanstein: error: {tmp_path}/{error}\n"


def test_a_disk_that_fails_while_files_are_written_is_one_line(tmp_path: Path) -> None:
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = ("prlimit", f"--fsize={3 * 2**20}")
    assert limit == resource.RLIM_INFINITY
    done = checkpoint("shard", EMBEDDED_MODEL, tmp_path / "out", "-tp", "2", before=before)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"ryzanstein: error: {tmp_path}/out: cannot be written: File too large\n"
    assert list(tmp_path.iterdir()) == []


# --- ends ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 600 MB of zeros, which are a hole in the file: writing it takes long enough to be interrupted."""
    directory = tmp_path_factory.mktemp("large") / "model"
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 8192,
        "num_hidden_layers": 9,
        "num_attention_heads": 8,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    meta = torch.device("meta")
    model = build_model(
        ModelConfig.from_directory(directory), CommunicationHandler(meta), device=meta, dtype=torch.bfloat16
    )
    pieces = (piece for target in targets_of(model) for piece in target.pieces(0, 1))
    header, places = make_header([(piece.sources[0], "BF16", tuple(piece.run.shape)) for piece in pieces], {})
    (directory / "model.safetensors").write_bytes(header)
    os.truncate(directory / "model.safetensors", max(place.stop for place in places.values()))
    return directory


@contextlib.contextmanager
def writing(command: list[str], folder: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """Give a process that has begun to write weights into `folder`."""
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        try:
            wait_until(lambda: any(path.stat().st_size for path in folder.rglob("weights_rank*")), 60)
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("words", "code"), [(["checkpoint", "verify", "."], 130), (["doctor"], 130), (["serve"], 0)])
def test_what_is_stopped_in_its_first_moments_was_not_done_unless_it_is_to_be_stopped(
    words: list[str], code: int
) -> None:
    script = """
import signal, sys
from server.__main__ import main
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "server.cli":
            signal.raise_signal(signal.SIGTERM)
sys.meta_path.insert(0, Finder())
sys.exit(main())
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, *words], capture_output=True, text=True, check=False, cwd=ROOT, timeout=60
    )
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_nothing(number: signal.Signals, large_model: Path, tmp_path: Path) -> None:
    command = [*CHECKPOINT, "shard", str(large_model), str(tmp_path / "new" / "out"), "-tp", "2"]
    with writing(command, tmp_path / "new") as process:
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, b"")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_command_left_is_removed_by_the_next(large_model: Path, tmp_path: Path) -> None:
    command = [*CHECKPOINT, "shard", str(large_model), str(tmp_path / "out")]
    with writing(command, tmp_path) as process:
        process.kill()
        process.wait(60)
    assert not (tmp_path / "out").exists()
    assert checkpoint("shard", EMBEDDED_MODEL, tmp_path / "out").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_in_the_background_it_dies_with_the_process_that_started_it(large_model: Path, tmp_path: Path) -> None:
    content = json.dumps({"source": str(large_model), "destination": str(tmp_path / "out")})
    script = f"""
import os, subprocess, sys
environment = {{**os.environ, {PARENT_PID_VARIABLE!r}: str(os.getpid())}}
child = subprocess.Popen([sys.executable, "-P", "-m", "engine.checkpoint", "shard", {content!r}], env=environment)
print(child.pid, flush=True)
child.wait()
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        wait_until(lambda: any(tmp_path.rglob("weights_rank*")), 60)
        parent.kill()
    child.wait(30)
    assert not (tmp_path / "out").exists()
