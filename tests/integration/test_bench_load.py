"""ryzanstein bench load: real ranks, real files, a table and a JSON document."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.bench.random_checkpoint import write_random_checkpoint
from engine.bench.shapes import raw_configs
from engine.checkpoint.convert import shard
from engine.protocol.commands import ShardCommand
from tests.leftovers import Leftovers, still_running

COMMAND = (str(Path(sys.executable).parent / "ryzanstein"), "bench", "load")
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 500,
    "vocab_size": 4001,
}
FIGURES = (
    *("load_seconds", "metadata_seconds", "touched_seconds", "plain_seconds", "plain_rate", "load_rate"),
    *("rate_share", "touch_rate", "touch_share", "memory_beyond_share", "peak_beyond_share"),
)
SECONDS = 200.0  # in which a command ends, on a busy machine too


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_random_checkpoint(folder / "hf", {**raw_configs()["1b"], **SHAPE})
    command = ShardCommand(
        source=str(folder / "hf"), destination=str(folder / "tp2"), tensor_parallel_size=2, progress=False
    )
    shard(command, lambda _: lambda _: None)
    return folder


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


def document(leftovers: Leftovers, *arguments: object) -> dict[str, Any]:
    done = bench(leftovers, *arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def check_phase(phase: dict[str, Any], runs: int) -> None:
    for name in FIGURES:
        figure = phase[name]
        assert len(figure["values"]) == runs
        assert figure["min"] <= figure["median"] <= figure["max"]
        assert name.endswith("_share") or figure["median"] >= 0
    assert 0 < phase["metadata_seconds"]["median"] < phase["load_seconds"]["median"]
    assert phase["load_seconds"]["max"] < phase["touched_seconds"]["max"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "saved_tp", "tp_size"),
    [("hf", None, 2), ("tp2", 2, 1), pytest.param("hf", None, 1, marks=pytest.mark.slow)],
)
def test_each_form_is_measured_at_each_number_of_ranks(
    form: str, saved_tp: int | None, tp_size: int, folder: Path, leftovers: Leftovers
) -> None:
    found = document(leftovers, folder / form, "-tp", tp_size, "--runs", 1, "--no-cold")
    assert found["path"] == str(folder / form)
    assert (found["form"], found["saved_tensor_parallel_size"]) == (
        "huggingface" if saved_tp is None else "distributed",
        saved_tp,
    )
    assert (found["tensor_parallel_size"], found["runs"], found["dtype"]) == (tp_size, 1, "bfloat16")
    assert found["cold"] is None
    check_phase(found["warm"], runs=1)
    assert len(found["weight_bytes"]) == len(found["warm"]["bytes_read"]) == tp_size


@pytest.mark.slow
def test_each_rank_of_as_many_as_saved_it_reads_its_own_bytes(folder: Path, leftovers: Leftovers) -> None:
    found = document(leftovers, folder / "tp2", "-tp", 2, "--runs", 2, "--no-cold")
    check_phase(found["warm"], runs=2)
    assert found["warm"]["bytes_read"] == found["weight_bytes"]
    for rank, size in enumerate(found["weight_bytes"]):
        header_and_fillers = (folder / "tp2" / f"weights_rank{rank}.safetensors").stat().st_size - size
        assert 0 < header_and_fillers < 20_000


def test_a_checkpoint_of_int8_is_loaded_as_it_is(folder: Path, tmp_path: Path, leftovers: Leftovers) -> None:
    shard(
        ShardCommand(
            source=str(folder / "hf"), destination=str(tmp_path / "int8"), quantization="int8", progress=False
        ),
        lambda _: lambda _: None,
    )
    found = document(leftovers, tmp_path / "int8", "--runs", 1, "--no-cold")
    assert found["dtype"] == "int8"
    assert found["warm"]["bytes_read"] == found["weight_bytes"]


@pytest.mark.slow
def test_cold_runs_read_from_the_disk_or_say_why_there_are_none(folder: Path, leftovers: Leftovers) -> None:
    found = document(leftovers, folder / "tp2", "-tp", 2, "--runs", 1)
    if found["cold"] is None:
        assert any("no cold runs" in note for note in found["notes"])
        return
    check_phase(found["cold"], runs=1)
    if found["cold"]["storage_bytes"] is not None:
        assert sum(found["cold"]["storage_bytes"]) >= 0.9 * sum(found["weight_bytes"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no file system in memory")
def test_files_that_cannot_be_dropped_have_no_cold_runs(folder: Path, leftovers: Leftovers) -> None:
    copy = Path("/dev/shm") / f"ryzanstein-bench-{os.getpid()}"
    try:
        subprocess.run(["cp", "-r", str(folder / "tp2"), str(copy)], check=True)
        found = document(leftovers, copy, "-tp", 2, "--runs", 1)
    finally:
        subprocess.run(["rm", "-r", str(copy)], check=True)
    assert found["cold"] is None
    assert "no cold runs: 100% of the files stay in the page cache" in found["notes"][0]


@pytest.mark.slow
def test_the_table_has_a_line_for_each_figure_and_columns_that_align(folder: Path, leftovers: Leftovers) -> None:
    done = bench(leftovers, folder / "tp2", "-tp", 1, "--runs", 2)
    assert (done.returncode, done.stderr) == (0, "")
    head, sizes, empty, heading, *rows = done.stdout.splitlines()
    assert head == f"{folder / 'tp2'}: distributed checkpoint of 2 ranks, loaded by 1 rank in bfloat16"
    assert "2 runs: median (least to most)" in sizes
    assert empty == ""
    start = heading.index("warm page cache")
    rows = [row for row in rows if row and not row.startswith("note:")]
    assert [row[:start].strip() for row in rows][:4] == [
        "load() returned",
        "of which metadata",
        "all weights touched",
        "plain map touched",
    ]
    for row in rows:
        assert row[start - 1] == " " != row[start]
    if "cold page cache" in heading:
        second = heading.index("cold page cache")
        assert all(row[second - 2 : second] == "  " and row[second] != " " for row in rows)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["{folder}/nothing"], "model: {folder}/nothing is not a directory"),
        (["{folder}"], "model: {folder} has neither config.json nor metadata.json, nor any model-step-N in it"),
        (["{folder}/tp2", "-tp", "3"], "--tensor-parallel-size 3 does not divide the model's 4 attention heads"),
        (["{folder}/tp2", "--runs", "0"], "--runs must be between 1 and"),
        (["{folder}/torn", "--runs", "1"], "{folder}/torn/weights_rank1.safetensors: is no whole safetensors file"),
        (["{folder}/gone", "--runs", "1"], "{folder}/gone/weights_rank0.safetensors: cannot be read: No such file"),
    ],
)
def test_a_mistake_ends_in_one_line_and_code_2(
    arguments: list[str], problem: str, folder: Path, leftovers: Leftovers
) -> None:
    for name in ("torn", "gone"):
        if not (folder / name).exists():
            subprocess.run(["cp", "-r", str(folder / "tp2"), str(folder / name)], check=True)
    os.truncate(folder / "torn" / "weights_rank1.safetensors", 5000)
    (folder / "gone" / "weights_rank0.safetensors").unlink(missing_ok=True)
    options = [] if "-tp" in arguments else ["-tp", 2]
    done = bench(leftovers, *(item.format(folder=folder) for item in arguments), *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"ryzanstein: error: {problem.format(folder=folder)}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_its_ranks(number: signal.Signals, folder: Path, leftovers: Leftovers) -> None:
    process = psutil.Popen(
        [*COMMAND, str(folder / "tp2"), "-tp", "2", "--runs", "1000", "--no-cold"],
        env={**os.environ, **leftovers.environment},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + SECONDS
    while len(ranks := process.children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(ranks) == 2
    process.send_signal(number)
    assert process.wait(SECONDS) == 130
    leftovers.check(ranks)


def test_a_rank_that_dies_is_named_in_one_line(folder: Path, leftovers: Leftovers) -> None:
    process = psutil.Popen(
        [*COMMAND, str(folder / "tp2"), "-tp", "2", "--runs", "1000", "--no-cold"],
        env={**os.environ, **leftovers.environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + SECONDS
    while len(ranks := process.children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks[1].kill()
    _, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert stderr.splitlines()[-1] == "ryzanstein: error: rank 1 was killed by SIGKILL"


@pytest.mark.slow
def test_a_reader_who_wants_no_more_ends_it_with_code_141(folder: Path, leftovers: Leftovers) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as output:
        done = subprocess.run(
            [*COMMAND, str(folder / "tp2"), "--runs", "1", "--no-cold"],
            env={**os.environ, **leftovers.environment},
            stdout=output,
            stderr=subprocess.PIPE,
            timeout=SECONDS,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.slow
def test_ranks_die_with_a_bench_that_is_killed(folder: Path, tmp_path: Path) -> None:
    process = psutil.Popen(
        [*COMMAND, str(folder / "tp2"), "-tp", "2", "--runs", "1000", "--no-cold"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + SECONDS
    while len(ranks := process.children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait(SECONDS)
    assert len(ranks) == 2
    assert still_running(ranks, 10.0) == []
