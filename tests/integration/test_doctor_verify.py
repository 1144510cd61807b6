"""`--verify` with real rank groups: right ones agree, and a group that adds up wrongly is found."""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from engine.protocol.checks import CheckResult, CheckStatus, run_checks
from engine.protocol.config import EMBEDDED_MODEL, EngineConfig
from engine.protocol.model_config import ModelConfig
from engine.worker import host
from server.doctor import verify
from server.early_engine import ORCHESTRATOR
from tests.checkpoints import random_llama

OK, WARNING, FAILURE, SKIPPED = CheckStatus.OK, CheckStatus.WARNING, CheckStatus.FAILURE, CheckStatus.SKIPPED


def examined(engine: EngineConfig, command: Sequence[str] = ORCHESTRATOR) -> dict[str, CheckResult]:
    results: dict[str, CheckResult] = {}

    def take(event: object) -> None:
        if isinstance(event, CheckResult):
            results[event.name] = event

    run_checks(verify.checks(engine, command), take)
    return results


def test_the_embedded_model_says_the_same_on_two_ranks_and_on_one(tell: Callable[[str], None]) -> None:
    results = examined(EngineConfig(num_kv_blocks=128, device="cpu"))
    tell(f"doctor --verify, embedded model in bfloat16: {results['same tokens'].detail}")
    tell(f"doctor --verify, embedded model in bfloat16: {results['same logprobs'].detail}")
    assert {name: result.status for name, result in results.items()} == {
        "2 ranks": OK,
        "1 rank": OK,
        "same tokens": OK,
        "same logprobs": OK,
    }
    assert "answered 8 prompts with 256 tokens" in results["2 ranks"].detail


def test_a_split_that_adds_up_wrongly_is_found() -> None:
    command = (sys.executable, "-m", "tests.fault.wrong_sums_group")
    results = examined(EngineConfig(tensor_parallel_size=2, num_kv_blocks=128, device="cpu", dtype="float32"), command)
    assert results["2 ranks"].status is results["1 rank"].status is OK
    assert results["same tokens"].status is FAILURE
    assert "unsplit" in results["same tokens"].detail
    assert results["same logprobs"].status is FAILURE


def test_a_model_that_splits_over_no_two_ranks_has_nothing_to_compare(tmp_path: Path) -> None:
    directory = random_llama(tmp_path, 7)  # 3 heads
    results = examined(EngineConfig(model=str(directory), num_kv_blocks=128, device="cpu"))
    assert [result.status for result in results.values()] == [SKIPPED, OK, SKIPPED, SKIPPED]
    assert results["2 ranks"].detail == "the model does not split over 2 ranks: there is nothing to compare"


def test_a_split_that_was_asked_for_and_cannot_start_is_a_failure(tmp_path: Path) -> None:
    directory = random_llama(tmp_path, 7)
    results = examined(EngineConfig(model=str(directory), tensor_parallel_size=2))
    assert results["2 ranks"].status is FAILURE
    assert results["1 rank"].status is SKIPPED


def test_a_group_that_fails_is_told_in_its_own_words(tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED_MODEL, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    results = examined(EngineConfig(model=str(tmp_path / "model"), device="cpu"))
    assert results["2 ranks"].status is WARNING
    assert results["1 rank"].status is FAILURE
    assert "was it downloaded completely?" in results["1 rank"].detail


def test_two_ranks_that_fail_where_one_was_asked_for_are_a_warning(tmp_path: Path) -> None:
    """With one KV head each rank has its own copy: here memory holds the cache of one rank, and not of two."""
    directory = random_llama(tmp_path, 0, num_key_value_heads=1)
    config = ModelConfig.from_directory(directory)
    block_size = 16384
    bytes_per_block = 2 * config.num_hidden_layers * block_size * config.head_dim * 4
    num_kv_blocks = host.total_memory() * 5 // 8 // bytes_per_block
    engine = EngineConfig(model=str(directory), block_size=block_size, num_kv_blocks=num_kv_blocks, device="cpu")
    results = examined(engine)
    assert results["2 ranks"].status is WARNING
    assert "cannot allocate" in results["2 ranks"].detail
    assert results["1 rank"].status is OK
    assert results["same tokens"].status is results["same logprobs"].status is SKIPPED


def test_a_group_that_never_becomes_ready_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "START_SECONDS", 1.0)
    results = examined(EngineConfig(), (sys.executable, "-c", "import sys; sys.stdin.read()"))
    assert results["1 rank"].status is FAILURE
    assert results["1 rank"].detail == "the ranks were not ready after 1 s"


def test_one_rank_that_cannot_hold_the_model_is_a_warning() -> None:
    """Unsplit, a KV block is twice as large: here the cache holds one for each of two ranks, and none for one."""
    per_block = 16 * 2 * 6 * 2 * 32 * 2
    results = examined(EngineConfig(tensor_parallel_size=2, kv_cache_memory=per_block, device="cpu"))
    assert results["2 ranks"].status is OK
    assert results["1 rank"].status is WARNING
    assert "--kv-cache-memory does not hold one KV block" in results["1 rank"].detail
    assert results["same tokens"].status is SKIPPED
