"""ryzanstein bench collectives: real ranks, a table and a JSON document."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.bench.collectives_messages import NUM_TOKENS, OPERATIONS
from engine.bench.collectives_report import HEADING, Collective, CollectivesBenchmark
from engine.bench.figures import Figure
from tests.leftovers import Leftovers
from tests.service_process import wait_until

COMMAND = (str(Path(sys.executable).parent / "ryzanstein"), "bench", "collectives")
SECONDS = 200.0  # in which a command ends, on a busy machine too


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=SECONDS, check=False)


def check_figures(item: dict[str, Any]) -> None:
    for name in ("seconds", "rate", "copy_seconds", "copies"):
        assert len(item[name]["values"]) == 1
        assert item[name]["median"] > 0
    assert item["num_bytes"] == item["num_tokens"] * 4096
    assert item["rate"]["median"] == pytest.approx(item["num_bytes"] / item["seconds"]["median"])
    if item["carrier"] == "gloo":
        assert item["transfer_seconds"] is item["waiting_seconds"] is None
    else:
        assert item["waiting_seconds"]["median"] >= 0
        assert 0 < item["transfer_seconds"]["max"] <= item["seconds"]["max"]


@pytest.mark.slow
def test_each_operation_is_measured_at_each_size_over_shared_memory_and_gloo() -> None:
    done = bench("-tp", "2", "--runs", "1", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["tensor_parallel_size"], found["runs"], found["notes"]) == (2, 1, [])
    assert [(item["carrier"], item["operation"], item["num_tokens"]) for item in found["collectives"]] == [
        (carrier, operation, num_tokens)
        for carrier in ("shared-memory", "gloo")
        for operation in OPERATIONS
        for num_tokens in NUM_TOKENS
    ]
    for item in found["collectives"]:
        check_figures(item)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("-tp", "1"), "--tensor-parallel-size must be at least 2: one rank has nobody to exchange data with"),
        (("-tp", "5000"), "--tensor-parallel-size must be at most 256, not 5000"),
        (("--runs", "0"), "--runs must be between 1 and 2147483647, not 0"),
    ],
)
def test_a_mistake_ends_in_one_line_and_code_2(arguments: tuple[str, ...], problem: str) -> None:
    done = bench(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"ryzanstein: error: {problem}")
    assert done.stderr.count("\n") == 1


def test_a_signal_ends_it_with_its_ranks() -> None:
    with Leftovers() as leftovers:
        process = psutil.Popen(
            [*COMMAND, "--runs", "10000"],
            env={**os.environ, **leftovers.environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: len(process.children()) == 2, SECONDS)
        ranks = process.children()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=SECONDS) == (None, "")
        assert process.returncode == 130
        leftovers.check(ranks)


def measured(carrier: str, num_tokens: int) -> Collective:
    of_shared_memory = Figure.of([1e-6, 3e-6]) if carrier == "shared-memory" else None
    return Collective(
        carrier=carrier,
        operation="all_reduce",
        num_tokens=num_tokens,
        num_bytes=4096 * num_tokens,
        seconds=Figure.of([2e-6, 4e-3]),
        transfer_seconds=of_shared_memory,
        waiting_seconds=of_shared_memory,
        rate=Figure.of([4e9, 2e9]),
        copy_seconds=Figure.of([1e-6, 1e-6]),
        copies=Figure.of([2, 4]),
    )


def test_the_table_has_both_carriers_of_a_size_below_each_other() -> None:
    collectives = tuple(measured(carrier, count) for carrier in ("shared-memory", "gloo") for count in (1, 8))
    report = CollectivesBenchmark(tensor_parallel_size=2, runs=2, collectives=collectives, notes=("some of it",))
    head, _, empty, heading, *rows, gap, note = report.to_table().splitlines()
    assert "2 ranks" in head
    assert empty == gap == ""
    assert note == "note: some of it"
    assert all(word in heading for word in HEADING)
    assert [row.split()[1:5:3] for row in rows] == [
        ["1", "shared-memory"],
        ["1", "gloo"],
        ["8", "shared-memory"],
        ["8", "gloo"],
    ]
    assert "2.0 µs to 4.00 ms" in rows[0]
    assert rows[0].endswith("2.0 µs    2.0 µs   3.00 GB/s  1.0 µs  3.0")
