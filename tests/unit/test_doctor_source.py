import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from engine.protocol.checks import CheckEvent, CheckResult, CheckStatus, run_checks
from engine.protocol.config import EMBEDDED_MODEL, EngineConfig
from engine.protocol.model_config import ModelConfig
from engine.protocol.model_directory import METADATA_FILE, step_directory
from server.config import ServerConfig
from server.doctor.source import ModelSource
from server.model_source.sharded_weights import find_entry


@pytest.fixture
def server(tmp_path: Path) -> ServerConfig:
    return ServerConfig(shard_cache_dir=str(tmp_path / "shards"))


def examine(source: ModelSource) -> dict[str, CheckResult]:
    found: dict[str, CheckResult] = {}

    def take(event: CheckEvent) -> None:
        if isinstance(event, CheckResult):
            found[event.name] = event

    run_checks(source.checks(), take)
    return found


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A model with more than 64 MiB of weights, of which only the size matters."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_bytes((EMBEDDED_MODEL / "config.json").read_bytes())
    with (directory / "model.safetensors").open("wb") as weights:
        os.truncate(weights.fileno(), 100 << 20)
    return directory


def test_the_parent_of_steps_is_its_latest_step(tmp_path: Path, server: ServerConfig) -> None:
    config = json.loads((EMBEDDED_MODEL / "config.json").read_text())
    older, step = (step_directory(tmp_path / "run", number) for number in (9, 10))
    for directory in (older, step):
        directory.mkdir(parents=True)
        (directory / METADATA_FILE).write_text(json.dumps({"config": config}))
    source = ModelSource(EngineConfig(model=str(tmp_path / "run")), server)
    found = examine(source)
    assert (found["model"].status, found["model"].detail) == (CheckStatus.OK, str(step))
    assert source.engine.model == str(step)
    assert found["shard cache"].status is CheckStatus.SKIPPED


def test_a_directory_that_is_not_there_is_left_to_the_other_checks_too(server: ServerConfig) -> None:
    source = ModelSource(EngineConfig(model="/no/such/model"), server)
    found = examine(source)
    assert found["model"].status is CheckStatus.FAILURE
    assert found["shard cache"].detail == "not without a usable config.json"
    assert source.is_here
    assert source.engine.model == "/no/such/model"


def test_it_says_whether_the_first_start_writes_or_maps(large: Path, server: ServerConfig) -> None:
    engine = EngineConfig(model=str(large), tensor_parallel_size=2)
    found = examine(ModelSource(engine, server))["shard cache"]
    assert found.detail.startswith("the first start writes 102.0 MiB to ")
    entry = find_entry(large, engine, ModelConfig.from_directory(large), server)
    assert entry is not None
    entry.directory.mkdir(parents=True)
    (entry.directory / METADATA_FILE).write_text("{}")
    found = examine(ModelSource(engine, server))["shard cache"]
    assert (found.status, found.detail) == (CheckStatus.OK, f"{entry.directory} is mapped")


def test_it_says_that_there_is_nothing_to_keep(large: Path, server: ServerConfig) -> None:
    found = examine(ModelSource(EngineConfig(), server))["shard cache"]
    assert found.detail == "nothing to keep: split already, or less than 64.0 MiB"
    found = examine(ModelSource(EngineConfig(model=str(large)), replace(server, shard_cache=False)))["shard cache"]
    assert (found.status, found.detail) == (CheckStatus.SKIPPED, "--no-shard-cache")
