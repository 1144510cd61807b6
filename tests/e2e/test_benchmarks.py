"""The scripts of benchmarks/: a real service, a table and a JSON document."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.protocol.config import EMBEDDED_MODEL

ROOT = Path(__file__).parents[2]
SECONDS = 200.0  # in which a script ends, on a busy machine too
SHORT = ("--batch", "2", "--context", "32", "--max-tokens", "400", "--runs", "1")


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"benchmarks/{script}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)


def test_steps_over_http_are_told_beside_what_the_machine_allows(tmp_path: Path) -> None:
    document = tmp_path / "http.json"
    done = run("http_decode.py", EMBEDDED_MODEL, *SHORT, "--quantization", "int8", "--json", document)
    assert (done.returncode, done.stderr) == (0, "")
    (found,) = json.loads(document.read_text())
    (measured,) = found["runs"]
    assert found["batch"] == 2
    assert measured["tokens_per_second"] == pytest.approx(2 / measured["step_seconds"])
    roof = max(measured["read_seconds"], measured["compute_seconds"])
    assert measured["roof_share"] == pytest.approx(roof / measured["step_seconds"])
    rates = (measured["read_rate_before"] + measured["read_rate_after"]) / 2
    size = (EMBEDDED_MODEL / "model.safetensors").stat().st_size
    assert 0.4 * size < measured["read_seconds"] * rates < 0.7 * size  # int8 has half of bfloat16's bytes, and scales
    heading, row = done.stdout.splitlines()
    assert heading.startswith("batch  tokens/s ")
    assert re.match(r"2 +[\d.]+ \([\d.]+ to [\d.]+\) +[\d.]+% ", row)


def test_streams_that_do_not_run_at_once_are_no_measurement() -> None:
    done = run("http_decode.py", EMBEDDED_MODEL, "--context", "32", "--max-tokens", "1", "--runs", "1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "http_decode.py: error: --max-tokens: too few for all streams to run at once\n"


def test_the_cost_of_metrics_is_a_ratio_of_throughputs_with_its_interval_over_rounds(tmp_path: Path) -> None:
    document = tmp_path / "cost.json"
    earlier = [{"pairs": [{"with": speed, "without": 100.0}] * 2} for speed in (90.0, 80.0)]
    document.write_text(json.dumps({"rounds": [earlier]}))
    short = ("--rounds", 1, "--pairs", 2, "--streams", 2, "--max-tokens", 8, "-tp", 2, "--json", document)
    done = run("metrics_cost.py", *short, "--scrape-seconds", 0.001)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(document.read_text())
    first, second = found["rounds"]
    assert first == earlier
    assert [order["started_first"] for order in second] == ["with", "without"]
    assert [len(order["pairs"]) for order in second] == [2, 2]
    assert all(order["scrapes"] >= 3 and order["scrape_bytes"] > 10_000 for order in second)  # in each load
    summary = found["summary"]
    seconds = [[sum(1 / pair[name] for pair in order["pairs"]) for name in ("with", "without")] for order in second]
    ratios = [math.sqrt(0.9 * 0.8), math.sqrt(math.prod(without / with_all for with_all, without in seconds))]
    assert summary["ratio_of_rounds"] == pytest.approx(ratios)
    assert summary["ratio"] == pytest.approx(math.sqrt(math.prod(ratios)))
    half = 12.706 * abs(math.log(ratios[0] / ratios[1])) / 2  # Student's t of one degree of freedom, by hand
    assert summary["ratio_95"] == pytest.approx([summary["ratio"] / math.exp(half), summary["ratio"] * math.exp(half)])
    assert re.search(r"^ratio +[\d.]+   \(95%: [\d.]+ to [\d.]+\)$", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_a_start_is_told_beside_the_import_of_torch(tmp_path: Path) -> None:
    document = tmp_path / "startup.json"
    done = run("startup.py", "--runs", 1, "-tp", 1, "--json", document)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(document.read_text())
    names = ["import torch", "tp 1: ready", "tp 1: first token"]
    assert list(found["summary"]) == list(found["seconds"]) == names
    assert all(found["seconds"][name][0] > 0 for name in names)
    assert found["summary"]["import torch"]["ratio"] == 1
    assert [line[:20].strip() for line in done.stdout.splitlines()[1:]] == names


def test_the_cost_of_metrics_is_told_by_token_and_page(tmp_path: Path) -> None:
    document = tmp_path / "metrics.json"
    done = run("metrics_cpu.py", "--streams", 4, "--ranks", 2, "--json", document)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(document.read_text())
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == list(found)
    assert list(found) == ["token", "page, text", "page, OpenMetrics"]
    assert all(0 < figures["lower"] <= figures["median"] <= figures["upper"] for figures in found.values())
    assert found["page, text"]["lines"] > 500


@pytest.mark.parametrize(
    ("script", "arguments", "problem"),
    [
        ("metrics_cpu.py", ["--streams", 0], "argument --streams: must be at least 1, not 0"),
        ("http_decode.py", ["/nothing"], "model: /nothing is not a directory"),
        ("http_decode.py", [EMBEDDED_MODEL, "--batch", 0], "argument --batch: must be at least 1, not 0"),
        ("startup.py", ["--runs", 0], "argument --runs: must be at least 1, not 0"),
        ("metrics_cost.py", ["--pairs", 0], "argument --pairs: must be at least 1, not 0"),
        (
            "metrics_cost.py",
            ["--scrape-seconds", 0],
            "argument --scrape-seconds: must be above 0 and finite, not 0",
        ),
    ],
)
def test_a_mistake_ends_in_one_line(script: str, arguments: list[object], problem: str) -> None:
    done = run(script, *arguments)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"{script}: error: {problem}"
