"""engine.bench.capacity: what is predicted is what the layers, and the files, take."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.bench.capacity import Capacity, Speeds, capacity_of, file_bytes, kv_bytes, load_time, weight_bytes
from engine.bench.random_checkpoint import write_random_checkpoint
from engine.bench.shapes import raw_configs, shape
from engine.checkpoint.convert import shard
from engine.communication.handler import CommunicationHandler
from engine.models.registry import build_model
from engine.protocol.commands import ShardCommand
from engine.protocol.model_config import ModelConfig
from engine.worker import kv_tensors
from tests.configs import model_config

META = torch.device("meta")


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    query_heads, kv_heads = draw(st.sampled_from([(8, 8), (8, 4), (8, 2), (8, 1), (12, 4), (6, 3)]))
    return model_config(
        vocab_size=draw(st.integers(9, 300)),
        hidden_size=draw(st.integers(1, 70)),
        intermediate_size=draw(st.integers(1, 99)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 9)),
        qkv_bias=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )


@settings(max_examples=60)
@given(configs(), st.data())
def test_the_formula_gives_what_a_ranks_layers_hold(config: ModelConfig, data: st.DataObject) -> None:
    tp_size = data.draw(st.sampled_from(config.tensor_parallel_sizes))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    model = build_model(config, CommunicationHandler.place(0, tp_size, META), device=META, dtype=dtype)
    assert weight_bytes(config, tp_size, dtype) == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_a_ranks_file_is_as_large_as_predicted(tp_size: int, tmp_path: Path) -> None:
    raw = {
        **raw_configs()["1b"],
        "hidden_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "intermediate_size": 53,
        "vocab_size": 101,
    }
    write_random_checkpoint(tmp_path / "model", raw)
    command = ShardCommand(
        source=str(tmp_path / "model"), destination=str(tmp_path / "cut"), tensor_parallel_size=tp_size, progress=False
    )
    shard(command, lambda _: lambda _: None)
    config = ModelConfig.from_directory(tmp_path / "cut")
    sizes = {path.stat().st_size for path in (tmp_path / "cut").glob("*.safetensors")}
    assert sizes == {file_bytes(config, tp_size, torch.bfloat16)}


def test_the_kv_cache_is_what_the_ranks_allocate() -> None:
    config = shape("1b")
    blocks = 3 * 7  # of 16 tokens, for three sequences of 100
    caches = kv_tensors.allocate(
        config, num_blocks=blocks, block_size=16, num_kv_heads=4, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    allocated = sum(cache.key.nbytes + cache.value.nbytes for cache in caches)
    assert kv_bytes(config, 2, torch.bfloat16, context=100, sequences=3) == allocated


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("1b", 1_235_814_400), ("7b", 6_738_415_616), ("13b", 13_015_864_320), ("70b", 68_976_648_192)],
)
def test_shapes_have_as_many_parameters_as_the_models_that_they_are_named_after(name: str, parameters: int) -> None:
    assert weight_bytes(shape(name), 1, torch.bfloat16) == 2 * parameters


def test_ranks_beyond_the_kv_heads_hold_copies() -> None:
    config = model_config(num_attention_heads=8, num_key_value_heads=2)
    halves, quarters = (kv_bytes(config, tp, torch.bfloat16, context=16, sequences=1) for tp in (2, 4))
    assert halves == quarters


def test_memory_is_weights_cache_and_overhead() -> None:
    found = capacity_of(shape("1b"), 2, dtype=torch.bfloat16, context=4096, sequences=8, overhead=1000)
    assert found.memory == found.weights + found.kv_cache + 1000
    assert found.kv_cache == 8 * 4096 * 2 * 16 * 4 * 64 * 2


def test_a_split_that_cannot_be_is_an_error() -> None:
    with pytest.raises(ValueError, match="--tensor-parallel-size 3 does not divide"):
        capacity_of(shape("1b"), 3, dtype=torch.bfloat16, context=16, sequences=1, overhead=0)


def test_the_slowest_of_disk_bus_and_memory_says_how_long_loading_takes() -> None:
    capacity = Capacity(weights=1000, file=1100, kv_cache=0, overhead=0)
    slow_disk = load_time(capacity, 4, Speeds(load_seconds=0.5, touch_rate=500, disk_rate=100, bus_rate=250))
    assert slow_disk.warm_cpu == 0.5 + 2
    assert slow_disk.cold_cpu == 0.5 + 44
    assert slow_disk.warm_device == 0.5 + 4
    assert slow_disk.cold_device == 0.5 + 44
    fast_disk = load_time(capacity, 4, Speeds(load_seconds=0.5, touch_rate=500, disk_rate=10**6, bus_rate=250))
    assert (fast_disk.cold_cpu, fast_disk.cold_device) == (0.5 + 2, 0.5 + 4)
