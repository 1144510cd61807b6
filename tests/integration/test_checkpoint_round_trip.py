"""From Hugging Face to a distributed checkpoint, to one of another size, and back: the same bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.checkpoint.convert import shard
from engine.checkpoint.export import export
from engine.checkpoint.metadata import CheckpointMetadata
from engine.checkpoint.tensor_header import is_filler
from engine.checkpoint.verify import verify
from engine.protocol.commands import ExportCommand, ShardCommand
from engine.protocol.model_directory import read_model_config
from tests.checkpoints import random_llama, random_mistral, random_qwen2

# Seeds at which 4 ranks are possible: with 4, 2, 1, 12 and 2 KV heads; odd sizes and biases as they are drawn.
MODELS = {
    "llama, 4 KV heads": lambda folder: random_llama(folder, 0),
    "llama, tied, 2 KV heads": lambda folder: random_llama(folder, 1),
    "llama, tied, 1 KV head": lambda folder: random_llama(folder, 3),
    "llama, all biases, bfloat16": lambda folder: random_llama(
        folder, 4, attention_bias=True, mlp_bias=True, dtype=torch.bfloat16
    ),
    "mistral": lambda folder: random_mistral(folder, 5),
    "qwen2": lambda folder: random_qwen2(folder, 1),
}


def nobody_looks(_: int) -> Callable[[int], None]:
    return lambda _: None


def to_shards(source: Path, destination: Path, tp_size: int, **options: Any) -> CheckpointMetadata:
    command = ShardCommand(
        source=str(source), destination=str(destination), tensor_parallel_size=tp_size, progress=False, **options
    )
    return shard(command, nobody_looks)


def to_huggingface(source: Path, destination: Path, **options: Any) -> Path:
    export(ExportCommand(source=str(source), destination=str(destination), progress=False, **options), nobody_looks)
    return destination


def bits(directory: Path) -> dict[str, Tensor]:
    """Return all tensors as bytes, so that those that are equal but not the same differ."""
    tensors = {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return {name: tensor.contiguous().flatten().view(torch.uint8) for name, tensor in tensors.items()}


def assert_same(first: Path, second: Path) -> None:
    before, after = bits(first), bits(second)
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def load(directory: Path) -> Any:
    """Have transformers load a directory, in which it must find just what it looks for."""
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    model, report = from_pretrained(directory, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(MODELS[request.param](tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def sharded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, cut for 4 ranks."""
    destination = tmp_path_factory.mktemp("sharded") / "model"
    to_shards(model, destination, 4)
    return destination


def test_what_was_cut_and_put_together_is_what_it_was(model: Path, sharded: Path, tmp_path: Path) -> None:
    assert_same(model, to_huggingface(sharded, tmp_path / "again"))


@pytest.mark.parametrize("sizes", [(2, 1), (1, 4, 2)], ids=str)
def test_it_may_be_cut_again_for_other_numbers_of_ranks_on_the_way(
    model: Path, sharded: Path, tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    source = sharded
    for tp_size in sizes:
        to_shards(source, tmp_path / f"{tp_size}", tp_size)
        source = tmp_path / f"{tp_size}"
    assert_same(model, to_huggingface(source, tmp_path / "again"))


def test_cut_from_one_form_or_the_other_it_has_the_same_bytes(model: Path, sharded: Path, tmp_path: Path) -> None:
    to_shards(sharded, tmp_path / "from-sharded", 2)
    to_shards(model, tmp_path / "from-hf", 2)
    for rank in range(2):
        name = f"weights_rank{rank}.safetensors"
        assert (tmp_path / "from-sharded" / name).read_bytes() == (tmp_path / "from-hf" / name).read_bytes()


def test_the_stock_library_opens_a_ranks_file_and_finds_what_the_metadata_says(sharded: Path) -> None:
    metadata = CheckpointMetadata.read(sharded)
    for file in metadata.files:
        with safe_open(sharded / file.name, "pt") as opened:
            names = [name for name in opened.keys() if not is_filler(name)]  # noqa: SIM118  (it is no dict)
            assert sorted(names) == sorted(tensor.name for tensor in metadata.tensors_in(file))
            for tensor in metadata.tensors_in(file):
                assert tuple(opened.get_tensor(tensor.name).shape) == tensor.local_shape


def test_transformers_loads_what_was_exported_and_computes_the_same(model: Path, sharded: Path, tmp_path: Path) -> None:
    exported = to_huggingface(sharded, tmp_path / "again")
    tokens = torch.arange(1, 60).unsqueeze(0)
    logits = []
    for directory in (model, exported):
        loaded = load(directory)
        with torch.no_grad():
            logits.append(loaded.eval()(tokens).logits)
    assert torch.equal(*logits)
    assert read_model_config(exported)[0] == read_model_config(model)[0]


def test_transformers_loads_an_export_in_several_files(tmp_path: Path) -> None:
    model = random_llama(tmp_path / "model", 1, hidden_size=512, intermediate_size=700, vocab_size=1009)
    exported = to_huggingface(model, tmp_path / "again", max_file_size=2**20)
    names = sorted(path.name for path in exported.glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert (exported / "model.safetensors.index.json").is_file()
    assert_same(model, exported)
    load(exported)


def test_a_hundred_and_twenty_eight_ranks_hold_the_same_model(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 2, "hidden_size": 128}
    model = random_llama(tmp_path / "model", 1, **heads, intermediate_size=131, attention_bias=True)
    metadata = to_shards(model, tmp_path / "sharded", 128)
    assert len(metadata.files) == 128
    assert verify(tmp_path / "sharded", nobody_looks).problems == []
    assert_same(model, to_huggingface(tmp_path / "sharded", tmp_path / "again"))
