"""Checkpoints of N ranks in models of M: each rank gets its slices, padding is zero, and nothing else is read."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.checkpoint.distributor import WeightDistributor
from engine.checkpoint.huggingface import SINGLE_FILE, HuggingFaceFiles
from engine.checkpoint.layout import lay_out
from engine.checkpoint.loader import ModelLoadConfig
from engine.checkpoint.metadata import CheckpointMetadata, FileMetadata, file_name
from engine.checkpoint.model_distributor import ModelDistributor
from engine.checkpoint.sharded import ShardedFiles
from engine.checkpoint.source import TensorSource
from engine.checkpoint.staging import Stager
from engine.checkpoint.targets import TensorSlice, targets_of
from engine.models.registry import build_model
from engine.parallel.base import ShardPart
from engine.protocol.model_config import ModelConfig
from tests.checkpoints import random_llama, random_qwen2
from tests.configs import model_config
from tests.sharded_checkpoints import CPU, place, shard, write

Tell = Callable[[str], None]
SIZES = (1, 2, 3, 4, 6, 8, 12, 16)


def nan_model(config: ModelConfig, rank: int, size: int, dtype: torch.dtype) -> nn.Module:
    """A rank's model in which every number that loading does not write is NaN."""
    model = build_model(config, place(rank, size), device=CPU, dtype=dtype)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    return model


def fill(model: nn.Module, source: TensorSource, rank: int, size: int) -> tuple[dict[str, Tensor], int]:
    """Fill a rank's model; return its tensors, and the bytes that the distributor was told of."""
    filled: list[int] = []
    with source:
        WeightDistributor(rank, size, Stager(CPU, filled.append)).fill(model, source)
    return {name: parameter.data for name, parameter in model.named_parameters()}, sum(filled)


def num_bytes(model: nn.Module) -> int:
    return sum(target.tensor.nbytes for target in targets_of(model))


def wanted_numbers(config: ModelConfig, rank: int, size: int) -> int:
    """How many numbers a rank holds, without padding: written down from the architecture."""

    def run(total: int, index: int = rank, runs: int = size) -> int:
        length = -(-total // runs)
        return max(0, min(total, (index + 1) * length) - index * length)

    hidden, head = config.hidden_size, config.head_dim
    kv_runs = min(size, config.num_key_value_heads)
    q = run(config.num_attention_heads * head)
    kv = run(config.num_key_value_heads * head, rank * kv_runs // size, kv_runs)
    middle = run(config.intermediate_size)
    layer = 2 * hidden + (q + 2 * kv) * (hidden + config.qkv_bias) + q * hidden + hidden * config.o_bias
    layer += 2 * middle * (hidden + config.mlp_bias) + middle * hidden + hidden * config.mlp_bias
    embeddings = 1 if config.tie_word_embeddings else 2
    return config.num_hidden_layers * layer + embeddings * run(config.vocab_size) * hidden + hidden


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    kv_heads = draw(st.sampled_from((1, 2, 3, 4)))
    heads = kv_heads * draw(st.integers(1, 4))
    return model_config(
        vocab_size=draw(st.integers(1, 40)),
        hidden_size=draw(st.integers(1, 9)),
        intermediate_size=draw(st.integers(1, 20)),
        num_hidden_layers=draw(st.integers(1, 2)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 3)),
        qkv_bias=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )


def valid_sizes(config: ModelConfig) -> list[int]:
    def is_valid(size: int) -> bool:
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)

    return [size for size in SIZES if is_valid(size)]


def save_hugging_face(config: ModelConfig, directory: Path, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Write random tensors as one Hugging Face file; return them."""
    torch.manual_seed(seed)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    heads["v_proj"] = heads["k_proj"]
    hidden, middle = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
    for name in ("model.embed_tokens.weight", *([] if config.tie_word_embeddings else ["lm_head.weight"])):
        shapes[name] = (config.vocab_size, hidden)
    for layer in (f"model.layers.{i}" for i in range(config.num_hidden_layers)):
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        linear = {f"self_attn.{name}": (n * config.head_dim, hidden, config.qkv_bias) for name, n in heads.items()}
        linear["self_attn.o_proj"] = (hidden, heads["q_proj"] * config.head_dim, config.o_bias)
        linear |= {f"mlp.{name}": (middle, hidden, config.mlp_bias) for name in ("gate_proj", "up_proj")}
        linear["mlp.down_proj"] = (hidden, middle, config.mlp_bias)
        for name, (rows, columns, has_bias) in linear.items():
            shapes[f"{layer}.{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{layer}.{name}.bias"] = (rows,)
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    directory.mkdir()
    save_file(tensors, directory / SINGLE_FILE)
    return tensors


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=configs(),
    data=st.data(),
    stored=st.sampled_from((torch.float32, torch.bfloat16)),
    wanted=st.sampled_from((torch.float32, torch.bfloat16)),
    use_memory_map=st.booleans(),
)
def test_any_checkpoint_loads_at_any_size_as_the_original_does(
    config: ModelConfig,
    data: st.DataObject,
    stored: torch.dtype,
    wanted: torch.dtype,
    use_memory_map: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    sizes = st.sampled_from(valid_sizes(config))
    saved_by, loaded_by = data.draw(sizes, "saved by"), data.draw(sizes, "loaded by")
    max_file_size = data.draw(st.sampled_from((None, 1, 500)), "largest file")
    save_hugging_face(config, folder / "hf", stored, seed=data.draw(st.integers(0, 99), "seed"))

    def make(group: Any) -> nn.Module:
        model = build_model(config, group, device=CPU, dtype=stored)
        with HuggingFaceFiles(folder / "hf") as files:
            WeightDistributor(group.rank, group.world_size, Stager(CPU)).fill(model, files)
        return model

    write(make, folder / "ck", saved_by, max_file_size=max_file_size)
    metadata = CheckpointMetadata.read(folder / "ck")
    for rank in range(loaded_by):
        near = rank * saved_by // loaded_by
        source = ShardedFiles(folder / "ck", metadata, use_memory_map=use_memory_map, near=near)
        model = nan_model(config, rank, loaded_by, wanted)
        own, told = fill(model, source, rank, loaded_by)
        expected, _ = fill(nan_model(config, rank, loaded_by, wanted), HuggingFaceFiles(folder / "hf"), rank, loaded_by)
        assert own.keys() == expected.keys()
        for name, tensor in own.items():
            assert torch.equal(tensor, expected[name]), name
        assert source.bytes_read == stored.itemsize * wanted_numbers(config, rank, loaded_by)
        assert told == num_bytes(model)  # progress ends at the whole


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs(), data=st.data())
def test_put_together_a_checkpoint_is_the_original(
    config: ModelConfig, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What other readers do: whole tensors, and slices along dimensions that were not cut."""
    folder = tmp_path_factory.mktemp("whole")
    saved_by = data.draw(st.sampled_from(valid_sizes(config)))
    tensors = save_hugging_face(config, folder / "hf", torch.float32, seed=1)

    def make(group: Any) -> nn.Module:
        model = build_model(config, group, device=CPU, dtype=torch.float32)
        with HuggingFaceFiles(folder / "hf") as files:
            WeightDistributor(group.rank, group.world_size, Stager(CPU)).fill(model, files)
        return model

    write(make, folder / "ck", saved_by)
    with ShardedFiles(folder / "ck", CheckpointMetadata.read(folder / "ck")) as source:
        assert sorted(source.names) == sorted(tensors)
        for name, tensor in tensors.items():
            shape = tuple(tensor.shape)
            assert torch.equal(source.read_slice(name, TensorSlice(shape)), tensor)
            for dim, size in enumerate(shape):
                wanted = TensorSlice(shape, dim, size // 3, size - size // 3)
                assert torch.equal(source.read_slice(name, wanted), wanted.of(tensor))


# --- many ranks -------------------------------------------------------------------------------------------------------


def padded_run(tensor: Tensor, dim: int, index: int, runs: int) -> Tensor:
    length = -(-tensor.shape[dim] // runs)
    shape = list(tensor.shape)
    shape[dim] = length * runs
    padded = torch.zeros(shape, dtype=tensor.dtype)
    padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return padded.narrow(dim, index * length, length)


def expected_tensor(tensors: dict[str, Tensor], name: str, rank: int, size: int, kv_heads: int) -> Tensor:
    """What a rank must hold, by slicing; nothing that the engine declares is asked."""
    module, _, kind = name.rpartition(".")
    base, _, last = module.rpartition(".")
    runs = min(kv_heads, size)
    if last == "qkv_proj":
        query = padded_run(tensors[f"{base}.q_proj.{kind}"], 0, rank, size)
        pair = [padded_run(tensors[f"{base}.{p}.{kind}"], 0, rank * runs // size, runs) for p in ("k_proj", "v_proj")]
        return torch.cat([query, *pair])
    if last == "gate_up_proj":
        return torch.cat([padded_run(tensors[f"{base}.{p}.{kind}"], 0, rank, size) for p in ("gate_proj", "up_proj")])
    if last in ("o_proj", "down_proj") and kind == "weight":
        return padded_run(tensors[name], 1, rank, size)
    return padded_run(tensors[name], 0, rank, size) if last in ("embed_tokens", "lm_head") else tensors[name]


MANY = model_config(
    vocab_size=1000,
    hidden_size=24,
    intermediate_size=300,
    num_hidden_layers=2,
    num_attention_heads=384,
    num_key_value_heads=8,
    head_dim=2,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
)


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(128, 128), (128, 64), (64, 128), (96, 128), (128, 96), (128, 1)])
def test_a_checkpoint_of_many_ranks_is_cut_as_slicing_cuts(saved_by: int, loaded_by: int, tmp_path: Path) -> None:
    tensors = save_hugging_face(MANY, tmp_path / "hf", torch.float32, seed=1)

    def make(group: Any) -> nn.Module:
        model = build_model(MANY, group, device=CPU, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            parameter.data = expected_tensor(tensors, name, group.rank, group.world_size, kv_heads=8).clone()
        return model

    write(make, tmp_path / "ck", saved_by)
    metadata = CheckpointMetadata.read(tmp_path / "ck")
    for rank in sorted({0, 1, loaded_by // 3, loaded_by - 2, loaded_by - 1} & set(range(loaded_by))):
        source = ShardedFiles(tmp_path / "ck", metadata, near=rank * saved_by // loaded_by)
        model = nan_model(MANY, rank, loaded_by, torch.float32)
        own, _ = fill(model, source, rank, loaded_by)
        for name, tensor in own.items():
            assert torch.equal(tensor, expected_tensor(tensors, name, rank, loaded_by, kv_heads=8)), (rank, name)
        assert source.bytes_read == 4 * wanted_numbers(MANY, rank, loaded_by)


def test_metadata_of_128_ranks_is_parsed_at_once(tmp_path: Path, tell: Tell) -> None:
    """Of a model of 80 layers, in several files a rank."""
    config = model_config(
        vocab_size=1280, hidden_size=1, intermediate_size=1, num_hidden_layers=80, num_attention_heads=128, head_dim=2
    )

    def make(group: Any) -> nn.Module:
        return build_model(config, group, device=CPU, dtype=torch.float32)

    model = make(place(0, 128))
    tensors = lay_out(targets_of(model), max_file_size=num_bytes(model) // 2)
    count = 1 + tensors[-1].file_index
    files = tuple(
        FileMetadata(name=file_name(rank, index, count), rank=rank, index=index, size=1, xxh3_128="0" * 32)
        for rank in range(128)
        for index in range(count)
    )
    content = CheckpointMetadata(model_name="test", tp_size=128, files=files, tensors=tensors).to_json()
    metadata, times = CheckpointMetadata.parse(content, tmp_path), list[float]()
    for _ in range(3):
        began = time.perf_counter()
        CheckpointMetadata.parse(content, tmp_path)
        times.append(time.perf_counter() - began)
    assert CheckpointMetadata.from_dict(metadata.to_dict()) == metadata
    assert metadata.files == files
    assert metadata.files_of(127) == list(files[-count:])
    assert [metadata.file_of(tensor, 5).index for tensor in tensors] == [tensor.file_index for tensor in tensors]
    tell(
        f"metadata of 128 ranks, {len(metadata.files)} files, {len(metadata.tensors)} tensors, "
        f"{len(content)} bytes: parsed in {1000 * min(times):.1f} ms"
    )


# --- other models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loaded_by", [1, 2, 4])
@pytest.mark.parametrize("saved_by", [1, 2, 4])
def test_a_qwen2_with_biases_loads_at_any_size(saved_by: int, loaded_by: int, tmp_path: Path) -> None:
    source = random_qwen2(tmp_path / "hf", 1)
    tensors = load_file(source / SINGLE_FILE)
    directory = shard(source, tmp_path / "ck", saved_by)
    config = ModelConfig.from_directory(source)
    for rank in range(loaded_by):
        model = nan_model(config, rank, loaded_by, torch.float32)
        own, _ = fill(model, ShardedFiles(directory, CheckpointMetadata.read(directory)), rank, loaded_by)
        for name, tensor in own.items():
            kv_heads = config.num_key_value_heads
            assert torch.equal(tensor, expected_tensor(tensors, name, rank, loaded_by, kv_heads)), name


class Plain(nn.Module):
    """Not of this engine: every rank has all of it."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(3)
        for tensor in self.state_dict().values():
            tensor.fill_(value)
        self.scale = nn.Parameter(torch.tensor(value), requires_grad=False)
        self.register_buffer("not_saved", torch.zeros(2), persistent=False)


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(1, 1), (1, 3), (3, 1), (2, 2), (4, 3)])
def test_a_module_without_parallel_layers_is_whole_on_every_rank(saved_by: int, loaded_by: int, tmp_path: Path) -> None:
    write(lambda _: Plain(3.0), tmp_path / "ck", saved_by)
    for rank in range(loaded_by):
        model = Plain(0.0)
        with ShardedFiles(tmp_path / "ck", CheckpointMetadata.read(tmp_path / "ck"), near=rank) as source:
            WeightDistributor(rank, loaded_by, Stager(CPU)).fill(model, source)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, Plain(3.0).state_dict()[name]), name


def test_a_model_without_memory_is_refused(tmp_path: Path) -> None:
    write(lambda _: Plain(3.0), tmp_path / "ck", 1)
    with pytest.raises(ValueError, match="lies on the device meta"):
        ModelDistributor(place(0, 1)).load_model(Plain(0.0).to("meta"), tmp_path / "ck")


def test_two_heads_that_are_stored_are_compared_where_they_are_one(tmp_path: Path) -> None:
    """At the same size, too, where tensors are otherwise taken as they are."""
    source = random_llama(tmp_path / "hf", 0, tie_word_embeddings=False)
    directory = shard(source, tmp_path / "ck", 1)
    tied = model_config(**{**vars(ModelConfig.from_directory(source)), "tie_word_embeddings": True})
    model = nan_model(tied, 0, 1, torch.float32)
    config = ModelLoadConfig(checkpoint_dir="", tp_size=1)
    with pytest.raises(ValueError, match=r"tensor lm_head.weight differs from model.embed_tokens.weight"):
        ModelDistributor(place(0, 1), config).load_model(model, directory)


def test_shard_parts_of_every_kind_cover_their_tensor_once() -> None:
    for size in range(1, 30):
        for ranks in range(1, 13):
            for shards in (s for s in range(1, ranks + 1) if ranks % s == 0):
                part = ShardPart("", size, math.ceil(size / shards) * shards, shards)
                bounds = sorted({part.bounds(rank, ranks) for rank in range(ranks)})
                covered = [i for start, stop in bounds for i in range(start, stop)]
                assert covered == list(range(size))
