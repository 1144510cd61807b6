"""ryzanstein bench decode and limits: a real engine, a table and a JSON document."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from engine.bench.random_checkpoint import write_random_checkpoint
from engine.bench.shapes import raw_configs
from engine.kernels.instruction_sets import usable_instruction_sets
from tests.leftovers import Leftovers

COMMAND = (str(Path(sys.executable).parent / "ryzanstein"), "bench")
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 500,
    "max_position_embeddings": 512,
}
SECONDS = 200.0  # in which a command ends, on a busy machine too
SHORT = ("--context", "40", "--prefill", "50", "--steps", "4", "--runs", "1")

LONG = ("--batch", "1", "--context", "40", "--prefill", "50", "--runs", "10000")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "model"
    write_random_checkpoint(directory, {**raw_configs()["1b"], **SHAPE})
    return directory


@pytest.fixture
def leftovers() -> Iterator[Leftovers]:
    with Leftovers() as leftovers:
        yield leftovers
        leftovers.check([])


def bench(leftovers: Leftovers, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env={**os.environ, **leftovers.environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.mark.slow
def test_ranks_are_measured_beside_one_rank(model: Path, leftovers: Leftovers) -> None:
    options = ("-tp", 2, "--threads", 1, "--compare", "--batch", "1,3", *SHORT, "--json")
    done = bench(leftovers, "decode", model, *options)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert [setup["name"] for setup in found["setups"]] == [
        "2 ranks, 1 thread each",
        "1 rank, 1 thread",
        "1 rank, 2 threads",
    ]
    for setup in found["setups"]:
        rows = setup["rows"]
        assert [(row["phase"], row["batch"], row["context"]) for row in rows] == [
            ("decode", 1, 40),
            ("decode", 3, 40),
            ("prefill", 1, 50),
        ]
        for row in rows:
            roof = max(row["read_seconds"]["median"], row["compute_seconds"]["median"])
            assert row["roof_share"]["median"] == pytest.approx(roof / row["step_seconds"]["median"])
            for share in (row["transfer_share"], row["waiting_share"]):
                assert share is None if setup["tensor_parallel_size"] == 1 else 0 < share["median"] < 1
        assert len(setup["memory"]) == setup["tensor_parallel_size"]
        for memory in setup["memory"]:
            assert memory["resident"] > memory["weights"] + memory["kv_cache"] > memory["kv_cache"] > 0
    assert found["kernels"] == next((item.name for item in usable_instruction_sets()), "torch")
    assert len(found["ratios"]) == 2 * 3
    assert {(limit["kind"], limit["cores"]) for limit in found["limits"]} >= {("read", 1), ("bfloat16", 1)}


@pytest.mark.slow
def test_batch_invariance_is_measured_beside_what_is_without(model: Path, leftovers: Leftovers) -> None:
    done = bench(leftovers, "decode", model, "--batch-invariant", "--batch", 2, *SHORT, "--prefill", "")
    assert (done.returncode, done.stderr) == (0, "")
    assert "thread, batch-invariant over 1 rank" in done.stdout or "threads, batch-invariant over 1 rank" in done.stdout
    assert "prefill" not in done.stdout


@pytest.mark.slow
def test_a_model_in_float16_is_measured_in_seconds(model: Path, leftovers: Leftovers) -> None:
    options = ("--dtype", "float16", "--batch", 1, *SHORT, "--prefill", "")
    done = bench(leftovers, "decode", model, *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert " in float16, quantization none, kernels torch; 1 run of 4 steps\n" in done.stdout


@pytest.mark.slow
def test_limits_of_each_number_of_cores_are_told(leftovers: Leftovers) -> None:
    done = bench(leftovers, "limits", "--runs", 1, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    cores = {limit["cores"] for limit in found["limits"]}
    assert min(cores) == 1
    assert max(cores) == found["num_cpus"]
    assert {limit["kind"] for limit in found["limits"]} == {"read", "float32", "bfloat16", "int8"}
    assert len(found["limits"]) == 4 * len(cores)
    assert all(limit["rate"]["median"] > 0 for limit in found["limits"])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["{model}/nothing"], "model: {model}/nothing is not a directory"),
        (["{model}", "-tp", "3"], "--tensor-parallel-size 3 does not divide the model's 4 attention heads"),
        (["{model}", "--context", "500", "--prefill", "1"], "--context, --prefill and --steps need 519 tokens"),
        pytest.param(["{model}", "--batch", "1,x"], "--batch must be numbers between 1 and", marks=pytest.mark.slow),
        pytest.param(
            ["{model}", "--context", "", "--prefill", ""],
            "--batch, --context and --prefill leave nothing to measure",
            marks=pytest.mark.slow,
        ),
        (["{model}", "--dtype", "float16", "--kernels", "avx2"], "--kernels avx2"),
    ],
)
def test_a_mistake_ends_in_one_line_and_code_2(
    arguments: list[str], problem: str, model: Path, leftovers: Leftovers
) -> None:
    options = [] if "--context" in arguments else SHORT
    done = bench(leftovers, "decode", *(item.format(model=model) for item in arguments), *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"ryzanstein: error: {problem.format(model=model)}")
    assert done.stderr.count("\n") == 1


def started(model: Path, leftovers: Leftovers) -> tuple[psutil.Popen, list[psutil.Process]]:
    """Start a long measurement; return it, and all that it has started when its ranks are there."""
    process = psutil.Popen(
        [*COMMAND, "decode", str(model), "-tp", "2", *LONG],
        env={**os.environ, **leftovers.environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + SECONDS
    while len(found := process.children(recursive=True)) < 4 and process.is_running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(found) >= 4  # the orchestrator, what forks the ranks, and they
    return process, sorted(found, key=lambda child: child.create_time())


def test_a_signal_ends_it_with_its_engine(model: Path, leftovers: Leftovers) -> None:
    process, children = started(model, leftovers)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    leftovers.check(children)


def test_an_engine_that_dies_is_told_in_one_line(model: Path, leftovers: Leftovers) -> None:
    process, children = started(model, leftovers)
    children[-1].kill()
    _, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert stderr.splitlines()[-1].startswith("ryzanstein: error: rank ")
    leftovers.check(children)
