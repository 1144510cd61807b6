"""The doctor's rank processes: real ones meet, add up and measure; broken ones are told."""

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest

from engine.doctor import capacity, group, model
from engine.doctor.subject import Subject
from engine.protocol.checks import CheckEvent, CheckResult, CheckStatus, run_checks
from engine.protocol.config import EngineConfig, RankSpec
from engine.worker.device import num_cuda_devices
from tests.kernels import usable_kernels

OK, FAILURE, SKIPPED = CheckStatus.OK, CheckStatus.FAILURE, CheckStatus.SKIPPED


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with TemporaryDirectory(prefix="doctor-", dir="/tmp") as folder:
        yield Path(folder)


def examined(run_dir: Path, engine: EngineConfig) -> tuple[Subject, dict[str, CheckResult]]:
    """Run the checks of model, ranks and capacity; return what is known afterwards, and each result."""
    spec, path = RankSpec(engine=engine, epoch=1, run_dir=str(run_dir)), run_dir / "spec.json"
    path.write_bytes(msgspec.json.encode(spec))
    subject = Subject(spec, path)
    results: dict[str, CheckResult] = {}

    def take(event: CheckEvent) -> None:
        if isinstance(event, CheckResult):
            results[f"{event.section}: {event.name}"] = event

    for section in (model, group, capacity):  # as the doctor has them
        run_checks(section.checks(subject), take)
    return subject, results


def test_ranks_meet_and_measure(run_dir: Path) -> None:
    subject, results = examined(run_dir, EngineConfig(tensor_parallel_size=2, num_kv_blocks=8, device="cpu"))
    assert [report.rank for report in subject.reports] == [0, 1]
    for report in subject.reports:
        assert report.are_sums_right
        assert report.read_bandwidth > 1e8
        assert all(len(times) > 50 and min(times) > 0 for times in report.all_reduce_seconds.values())
        assert report.capacity.num_kv_blocks == 8
        assert report.capacity.weight_bytes == subject.reports[0].capacity.weight_bytes
    assert results["ranks: processes"].detail.startswith("2 ranks met in ")
    assert results["ranks: devices"].detail == "all ranks on the CPU"
    assert results["ranks: kernels"].detail == usable_kernels()[0]
    assert "4.0 KiB in" in results["ranks: all-reduce"].detail
    assert "128 tokens of 1.5 KiB, 1.0 full contexts of 128" in results["capacity: KV cache"].detail
    assert FAILURE not in {result.status for result in results.values()}


def test_batch_invariance_is_told_where_it_is_kept(run_dir: Path) -> None:
    _, results = examined(run_dir, EngineConfig(device="cpu", kernels=usable_kernels()[0], batch_invariant=True))
    assert results["ranks: kernels"].detail == f"{usable_kernels()[0]}, batch-invariant"
    assert results["ranks: kernels"].status is OK


def test_batch_invariance_that_cannot_be_kept_fails_in_servings_words(run_dir: Path) -> None:
    _, results = examined(run_dir, EngineConfig(device="cpu", kernels="torch", batch_invariant=True))
    assert results["ranks: processes"].status is FAILURE
    assert results["ranks: processes"].detail.startswith("--batch-invariant needs the C++ kernels")


def test_variables_of_another_launcher_change_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "two")
    _, results = examined(run_dir, EngineConfig(num_kv_blocks=128))
    assert FAILURE not in {result.status for result in results.values()}


def test_one_rank_has_no_collectives(run_dir: Path) -> None:
    _, results = examined(run_dir, EngineConfig(device="cpu"))
    assert results["ranks: all-reduce"].status is SKIPPED
    assert results["ranks: processes"].detail.startswith("one rank started")
    assert "all-reduces" not in results["capacity: speed limit"].detail


def test_a_cache_that_holds_no_block_fails_in_servings_words(run_dir: Path) -> None:
    _, results = examined(run_dir, EngineConfig(kv_cache_memory=1000, device="cpu"))
    result = results["capacity: KV cache"]
    assert result.status is FAILURE
    assert result.detail == "--kv-cache-memory does not hold one KV block of 49152 bytes"


def test_a_context_that_the_cache_cannot_hold_fails_in_servings_words(run_dir: Path) -> None:
    _, results = examined(run_dir, EngineConfig(num_kv_blocks=2, max_model_len=33, device="cpu"))
    result = results["capacity: KV cache"]
    assert result.status is FAILURE
    assert result.detail.startswith("--max-model-len 33 does not fit: the KV cache holds 32 tokens")


def test_ranks_that_a_model_does_not_split_over_are_not_started(run_dir: Path) -> None:
    _, results = examined(run_dir, EngineConfig(tensor_parallel_size=3, device="cpu"))
    assert results["ranks: processes"].detail == "not without a model that splits over the ranks"
    assert results["capacity: weights"].detail == "not without running ranks"


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
        ("import sys; sys.exit(3)", "exited with code 3"),
    ],
)
def test_a_rank_that_ends_is_a_failure(
    program: str, problem: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "RANK_COMMAND", (sys.executable, "-c", program))
    _, results = examined(run_dir, EngineConfig(device="cpu"))
    assert results["ranks: processes"].status is FAILURE
    assert problem in results["ranks: processes"].detail


def test_ranks_that_say_nothing_are_named(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "RANK_COMMAND", (sys.executable, "-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(group, "REPORT_SECONDS", 0.5)
    _, results = examined(run_dir, EngineConfig(tensor_parallel_size=2, device="cpu"))
    assert results["ranks: processes"].detail == "rank 0, 1 did not answer within 500.0 ms"


def test_cuda_that_is_not_there_fails_in_servings_words(run_dir: Path) -> None:
    _, results = examined(run_dir, EngineConfig(device="cuda"))
    if num_cuda_devices():
        pytest.skip("there is a CUDA device")
    for name in ("ranks: devices", "ranks: processes"):
        assert results[name].status is FAILURE
        assert results[name].detail == "--device cuda: rank needs CUDA device 0, and 0 are visible"
