"""What the shard cache does for a service, with the real writer and without the service."""

import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from engine.protocol.config import EMBEDDED_MODEL, EngineConfig
from engine.protocol.model_config import ModelConfig
from engine.protocol.model_directory import is_distributed
from server.model_source.config import ModelSourceConfig
from server.model_source.sharded_weights import Entry, ShardedWeights, default_root, find_entry
from tests.checkpoints import random_llama
from tests.service_process import wait_until

BIG_ENOUGH = {  # 72 MiB in float32
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
WRITE_SECONDS = 120.0  # generous: only a hang should exceed it


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("model") / "llama", 0, **BIG_ENOUGH)


@pytest.fixture
def config(tmp_path: Path) -> ModelSourceConfig:
    return ModelSourceConfig(shard_cache_dir=str(tmp_path / "shards"))


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO):
        yield


def entry_of(model: Path, config: ModelSourceConfig, **options: object) -> Entry | None:
    engine = EngineConfig(**{"tensor_parallel_size": 2, "dtype": "bfloat16", **options})  # type: ignore[arg-type]
    return find_entry(model, engine, ModelConfig.from_directory(model), config)


def some_entry(model: Path, config: ModelSourceConfig, **options: object) -> Entry:
    entry = entry_of(model, config, **options)
    assert entry is not None
    return entry


def write(entry: Entry) -> None:
    """Have a service write the entry, and end."""
    weights = ShardedWeights(entry)
    weights.start_writing()
    wait_until(lambda: entry.is_there, WRITE_SECONDS)
    weights.close()


def is_kept(entry: Entry) -> bool:
    return entry.is_there


def hidden(entry: Entry) -> list[str]:
    """What is in the folder besides entries and locks."""
    return [path.name for path in entry.cache.root.iterdir() if ".tmp-" in path.name]


def writers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "engine.checkpoint" in child.cmdline()]


def test_the_first_start_writes_what_the_second_maps(model: Path, config: ModelSourceConfig) -> None:
    first = ShardedWeights(some_entry(model, config))
    assert first.directory is None
    first.start_writing()
    wait_until(lambda: some_entry(model, config).is_there, WRITE_SECONDS)
    first.close()
    second = ShardedWeights(some_entry(model, config))
    assert second.directory == some_entry(model, config).directory
    assert is_distributed(second.directory)
    assert sorted(path.name for path in second.directory.glob("*.safetensors")) == [
        "weights_rank0.safetensors",
        "weights_rank1.safetensors",
    ]
    second.close()
    assert ShardedWeights(some_entry(model, config, tensor_parallel_size=1)).directory is None


def test_int8_matrices_have_an_entry_of_their_own(model: Path, config: ModelSourceConfig) -> None:
    plain, entry = some_entry(model, config), some_entry(model, config, quantization="int8")
    assert entry.name.startswith(f"{plain.name.rpartition('-')[0]}-int8-")
    write(entry)
    assert not plain.is_there
    metadata = json.loads((entry.directory / "metadata.json").read_text())
    assert metadata["dtype"] == "int8"
    size = sum(path.stat().st_size for path in entry.directory.glob("*.safetensors"))
    assert size <= entry.key.entry_bytes <= 1.15 * size
    assert ShardedWeights(some_entry(model, config, quantization="int8")).directory == entry.directory


def test_the_writer_takes_only_what_nobody_else_wants(model: Path, config: ModelSourceConfig) -> None:
    weights = ShardedWeights(some_entry(model, config))
    os.environ["RYZANSTEIN_API_KEY"] = "secret"
    try:
        weights.start_writing()
        wait_until(lambda: len(writers()) == 1, 30)
        (writer,) = writers()
        wait_until(lambda: writer.nice() == 19, 30)
        assert writer.ionice().ioclass == psutil.IOPRIO_CLASS_IDLE
        assert writer.environ()["OMP_NUM_THREADS"] == "1"
        assert "secret" not in writer.environ().values()
    finally:
        del os.environ["RYZANSTEIN_API_KEY"]
        weights.close()


def stop_in_the_middle(writer: psutil.Process, entry: Entry) -> None:
    deadline = time.monotonic() + WRITE_SECONDS
    writer.suspend()
    while not hidden(entry):
        assert not entry.is_there, "it has written all"
        assert time.monotonic() < deadline
        writer.resume()
        time.sleep(0.002)
        writer.suspend()


def test_a_service_that_ends_ends_its_writer_and_leaves_nothing(model: Path, config: ModelSourceConfig) -> None:
    entry = some_entry(model, config)
    weights = ShardedWeights(entry)
    weights.start_writing()
    try:
        wait_until(lambda: len(writers()) == 1, 30)
        stop_in_the_middle(writers()[0], entry)
    finally:
        weights.close()
    assert writers() == []
    assert hidden(entry) == []
    assert not is_kept(entry)
    write(entry)


def test_of_two_that_start_at_once_one_writes(
    model: Path, config: ModelSourceConfig, caplog: pytest.LogCaptureFixture
) -> None:
    entry = some_entry(model, config)
    both = [ShardedWeights(entry), ShardedWeights(entry)]
    for weights in both:
        weights.start_writing()
    wait_until(lambda: entry.is_there, WRITE_SECONDS)
    third = ShardedWeights(entry)
    for weights in (*both, third):
        weights.close()
    messages = [record.getMessage() for record in caplog.records]
    assert len([message for message in messages if "writing" in message]) == 1
    assert not [message for message in messages if "not kept" in message]


def test_an_entry_makes_room_for_another_unless_it_is_in_use(
    model: Path, config: ModelSourceConfig, caplog: pytest.LogCaptureFixture
) -> None:
    small = replace(config, shard_cache_size=50 << 20)  # one entry is 36 MiB in bfloat16
    two, one = some_entry(model, small), some_entry(model, small, tensor_parallel_size=1)
    write(two)
    user = ShardedWeights(two)
    weights = ShardedWeights(one)
    weights.start_writing()
    wait_until(lambda: "all others are in use" in caplog.text, 30)
    weights.close()
    assert is_kept(two)
    user.close()
    write(one)
    assert not is_kept(two)
    assert f"removed {two.name}, which was not used for longest" in caplog.text


def test_what_is_too_large_is_not_kept(
    model: Path, config: ModelSourceConfig, caplog: pytest.LogCaptureFixture
) -> None:
    entry = some_entry(model, replace(config, shard_cache_size=30 << 20))
    weights = ShardedWeights(entry)
    weights.start_writing()
    wait_until(lambda: f"{model} is not kept: 37." in caplog.text, 30)
    weights.close()
    assert not is_kept(entry)


def test_a_folder_that_cannot_be_made_is_one_line(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = some_entry(model, ModelSourceConfig(shard_cache_dir="/proc/shards"))
    weights = ShardedWeights(entry)
    weights.start_writing()
    weights.close()
    assert weights.directory is None
    assert [record.getMessage() for record in caplog.records] == [
        "shard cache: not used: /proc/shards: No such file or directory"
    ]


def test_there_is_nothing_to_do_when_switched_off_for_small_models_and_for_split_ones(
    model: Path, config: ModelSourceConfig
) -> None:
    assert entry_of(model, replace(config, shard_cache=False)) is None
    assert entry_of(EMBEDDED_MODEL, config) is None
    entry = some_entry(model, config)
    write(entry)
    assert entry_of(entry.directory, config) is None
    nothing = ShardedWeights(None)
    nothing.start_writing()
    assert nothing.directory is None
    assert nothing.explain("an error").error == "an error"
    nothing.close()


def test_an_entry_that_cannot_be_read_is_removed(model: Path, config: ModelSourceConfig) -> None:
    entry = some_entry(model, config)
    write(entry)
    weights = ShardedWeights(entry)
    file = f"{entry.directory}/weights_rank1.safetensors"
    assert weights.explain("something else") == ("something else", False)
    assert is_kept(entry)
    explained = weights.explain(f"rank 1: {file}: is truncated")
    assert explained.error == f"rank 1: {file}: is truncated; it was of the shard cache, and is removed: start again"
    assert explained.is_cured
    assert not is_kept(entry)
    weights.close()


def test_what_is_left_of_an_entry_is_written_anew(model: Path, config: ModelSourceConfig) -> None:
    entry = some_entry(model, config)
    write(entry)
    (entry.directory / "metadata.json").unlink()  # as a cleaner of old files does it
    write(entry)
    assert is_kept(entry)
    assert hidden(entry) == []


def test_without_a_home_nothing_is_kept_and_the_log_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # whom no list of users knows, as in containers
    assert entry_of(model, ModelSourceConfig()) is None
    assert "shard cache: not used: there is no home directory; --shard-cache-dir names another" in caplog.text


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_root() == Path("/caches/ryzanstein/shards")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_root() == Path("/home/somebody/.cache/ryzanstein/shards")
