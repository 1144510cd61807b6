"""Checks of a model directory: each is broken on purpose."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.convert import shard
from engine.doctor import model
from engine.doctor.subject import Subject
from engine.protocol.checks import CheckResult, CheckStatus, MissingBasisError, run_checks
from engine.protocol.commands import ShardCommand
from engine.protocol.config import EngineConfig, RankSpec
from tests.checkpoints import random_llama

OK, WARNING, FAILURE, SKIPPED = CheckStatus.OK, CheckStatus.WARNING, CheckStatus.FAILURE, CheckStatus.SKIPPED


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return random_llama(tmp_path / "model", 0, tie_word_embeddings=False, num_hidden_layers=1)


def subject(directory: Path, **options: object) -> Subject:
    engine = EngineConfig(model=str(directory), **options)  # type: ignore[arg-type]
    return Subject(RankSpec(engine=engine, epoch=1, run_dir="/nowhere"), Path("/nowhere/spec.json"))


def examined(directory: Path, **options: object) -> dict[str, CheckResult]:
    """Return each check's result by name."""
    results: dict[str, CheckResult] = {}

    def take(event: object) -> None:
        if isinstance(event, CheckResult):
            results[event.name] = event

    run_checks(model.checks(subject(directory, **options)), take)
    return results


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def edit_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def statuses(results: dict[str, CheckResult]) -> dict[CheckStatus, list[str]]:
    return {status: [name for name, result in results.items() if result.status is status] for status in CheckStatus}


def test_a_whole_directory_passes_every_check(directory: Path) -> None:
    found = statuses(examined(directory))
    assert found[FAILURE] == found[WARNING] == found[SKIPPED] == []
    assert found[OK] == [
        "config.json",
        "split",
        "context",
        "weight files",
        "tensors",
        "tensor values",
        "number type",
        "page cache",
    ]


def test_without_a_directory_one_check_fails_and_the_others_say_what_they_miss(tmp_path: Path) -> None:
    results = examined(tmp_path / "absent")
    assert statuses(results)[FAILURE] == ["config.json"]
    assert len(statuses(results)[SKIPPED]) == len(results) - 1
    assert results["split"].detail == "not without a usable config.json"
    assert results["page cache"].detail == "not without whole weights"


def test_a_directory_that_cannot_be_looked_into_fails_one_check(tmp_path: Path) -> None:
    results = examined(tmp_path / ("n" * 300))
    assert statuses(results)[CheckStatus.FAILURE] == ["config.json", "weight files"]
    assert results["config.json"].detail.endswith("nnn cannot be looked into: File name too long")


def test_an_unknown_architecture_fails_before_any_rank_would_start(directory: Path) -> None:
    edit_config(directory, architectures=["NobodyForCausalLM"])
    result = examined(directory)["config.json"]
    assert result.status is FAILURE
    assert "architectures names NobodyForCausalLM, which is not known; known: LlamaForCausalLM, " in result.detail


def test_a_model_that_does_not_split_fails_with_the_numbers_that_do(directory: Path) -> None:
    result = examined(directory, tensor_parallel_size=5)["split"]
    assert result.status is FAILURE
    assert "does not divide the model's 12 attention heads; possible: 1, 2, 4, 12" in result.detail


def test_padding_and_shared_kv_heads_are_told(directory: Path) -> None:
    detail = examined(directory, tensor_parallel_size=12)["split"].detail
    assert "12 ranks of 1 query heads and 1 KV heads, each held by 3 ranks" in detail
    assert "vocabulary padded from" in detail


def test_a_context_that_the_model_does_not_know_fails(directory: Path) -> None:
    result = examined(directory, max_model_len=513)["context"]
    assert result.status is FAILURE
    assert "--max-model-len 513 is more than the model's max_position_embeddings, 512" in result.detail


def test_a_context_that_a_sliding_window_bounds_is_told(directory: Path) -> None:
    edit_config(directory, architectures=["MistralForCausalLM"], sliding_window=100)
    assert examined(directory)["context"].detail.startswith("100 tokens, one sliding window of its 512 positions")
    result = examined(directory, max_model_len=101)["context"]
    assert result.status is FAILURE
    assert "--max-model-len 101 is more than the model's sliding_window, 100" in result.detail


def test_a_truncated_file_fails(directory: Path) -> None:
    path = directory / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    results = examined(directory)
    assert results["weight files"].status is FAILURE
    assert "was it downloaded completely?" in results["weight files"].detail
    assert results["tensors"].detail == "not without whole weight files"


def test_several_wrong_tensors_are_told_at_once(directory: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][1:].clone()
        tensors["lora"] = torch.zeros(1)

    edit_tensors(directory, edit)
    results = examined(directory)
    assert results["tensors"].status is FAILURE
    assert "model.norm.weight is missing" in results["tensors"].detail
    assert "model.layers.0.mlp.up_proj.weight has shape" in results["tensors"].detail
    assert "has no place for tensor lora" in results["tensors"].detail
    assert results["tensor values"].detail == "not without whole weights"


def test_many_wrong_tensors_are_not_all_listed(directory: Path) -> None:
    edit_config(directory, hidden_size=json.loads((directory / "config.json").read_text())["hidden_size"] + 1)
    detail = examined(directory)["tensors"].detail
    assert detail.count("config.json asks for") == model.SHOWN_PROBLEMS
    assert detail.endswith("; …")


def test_a_number_that_float16_cannot_hold_fails(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    assert examined(directory)["tensor values"].status is OK
    result = examined(directory, dtype="float16")["tensor values"]
    assert result.status is FAILURE
    assert "model.norm.weight has values that float16 cannot hold" in result.detail


def test_tied_tensors_that_differ_fail(directory: Path) -> None:
    edit_config(directory, tie_word_embeddings=True)
    result = examined(directory)["tensor values"]
    assert result.status is FAILURE
    assert "although config.json ties them into one" in result.detail


def test_a_type_without_hardware_for_it_is_warned_of(
    directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : fpu avx2\n")
    monkeypatch.setattr(model, "CPUINFO", cpuinfo)
    result = examined(directory, dtype="bfloat16", device="cpu")["number type"]
    assert result.status is WARNING
    assert result.detail == "bfloat16; stored as float32; this processor has no instructions for it"
    assert examined(directory, dtype="float32", device="cpu")["number type"].status is OK


def test_files_that_were_just_written_are_in_the_page_cache(directory: Path) -> None:
    paths = [directory / "model.safetensors"]
    share = model.cached_share(paths)
    assert share is None or share > 0.99
    assert model.read_speed(paths[0]) > 0


@pytest.fixture
def sharded(directory: Path, tmp_path: Path) -> Path:
    """The same model as a distributed checkpoint of two ranks."""
    destination = tmp_path / "sharded"
    shard(
        ShardCommand(source=str(directory), destination=str(destination), tensor_parallel_size=2),
        lambda _total: lambda _count: None,
    )
    return destination


def test_a_distributed_checkpoint_passes_every_check_its_checksums_too(sharded: Path) -> None:
    results = examined(sharded, tensor_parallel_size=4)
    found = statuses(results)
    assert found[FAILURE] == found[WARNING] == found[SKIPPED] == []
    assert results["checksums"].detail == "those of 2 file(s) are as when they were written"


def test_a_flipped_byte_of_a_distributed_checkpoint_fails_and_names_its_file(sharded: Path) -> None:
    path = sharded / "weights_rank1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    results = examined(sharded)
    assert statuses(results)[FAILURE] == ["checksums"]
    assert results["checksums"].detail.startswith(f"{path}: has checksum ")


def test_a_missing_file_of_a_distributed_checkpoint_fails(sharded: Path) -> None:
    (sharded / "weights_rank0.safetensors").unlink()
    results = examined(sharded)
    assert statuses(results)[FAILURE] == ["weight files"]
    assert "weights_rank0.safetensors: is missing" in results["weight files"].detail


def test_what_checks_build_on_is_missing_until_it_is_found(directory: Path) -> None:
    empty = subject(directory)
    with pytest.raises(MissingBasisError, match="running ranks"):
        empty.all_reports()
    with pytest.raises(MissingBasisError, match=r"config\.json"):
        empty.usable_model()
