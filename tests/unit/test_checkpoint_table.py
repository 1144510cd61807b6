"""What `inspect` shows: once for layers that are alike, with what is fused, padded and replicated."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from engine.checkpoint.contents import Contents, contents_of
from engine.checkpoint.convert import shard
from engine.checkpoint.table import table_of
from engine.protocol.commands import ShardCommand
from tests.checkpoints import random_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 layers, 4 query heads and 1 KV head, tied, vocabulary 257."""
    return random_llama(tmp_path_factory.mktemp("hf") / "model", 3, num_hidden_layers=2, attention_bias=False)


@pytest.fixture(scope="module")
def sharded(model: Path) -> Contents:
    command = ShardCommand(source=str(model), destination=str(model.parent / "sharded"), tensor_parallel_size=4)
    shard(command, lambda _: lambda _: None)
    return contents_of(model.parent / "sharded")


def lines(contents: Contents, width: int | None = None) -> list[str]:
    return table_of(contents, width=width).splitlines()


def test_it_says_what_model_it_is_and_where_it_can_be_loaded(sharded: Contents) -> None:
    table = lines(sharded)
    assert table[0] == f"{sharded.path}: a distributed checkpoint, format version 1"
    for line in ("name         model", "step         0", "type         float32", "cut for      4 ranks"):
        assert line in table
    assert "loads on     1, 2, 4 ranks" in table


def test_layers_that_are_alike_are_shown_once(sharded: Contents) -> None:
    table = lines(sharded)
    assert table.count("  model.layers.0 … 1") == 1
    assert sum("o_proj.weight" in line for line in table) == 1


def test_layers_that_differ_are_shown_apart(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].half()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    table = lines(contents_of(tmp_path))
    assert "  model.layers.0" in table
    assert "  model.layers.1" in table


def test_what_is_fused_padded_and_replicated_is_said_below(sharded: Contents) -> None:
    table = lines(sharded)
    below = {line.split()[0]: table[index + 1].strip() for index, line in enumerate(table[:-1]) if line.split()}
    head, vocabulary, size = (sharded.config[name] for name in ("head_dim", "vocab_size", "intermediate_size"))
    assert below["model.embed_tokens.weight"] == f"{vocabulary}, padded to {vocabulary + -vocabulary % 4}"
    kv = f"{head}, each run of {head} on 4 ranks"
    assert below["self_attn.qkv_proj.weight"] == f"q_proj {4 * head}; k_proj {kv}; v_proj {kv}"
    padded = f"{size}, padded to {size + -size % 4}"
    assert below["mlp.gate_up_proj.weight"] == f"gate_proj {padded}; up_proj {padded}"


def test_a_row_has_the_shape_of_all_ranks_and_of_each(sharded: Contents) -> None:
    hidden, heads, head = (sharded.config[name] for name in ("hidden_size", "num_attention_heads", "head_dim"))
    (row,) = [line.split() for line in lines(sharded) if "o_proj.weight" in line]
    assert row[1:] == ["F32", f"{hidden}x{heads * head}", "dim", "1", f"{hidden}x{head}"]


@pytest.mark.parametrize("width", [40, 50, 60, 80, 120])
def test_no_line_is_wider_than_the_terminal_and_no_name_is_lost(sharded: Contents, width: int) -> None:
    table = lines(sharded, width)[1:]  # the path is as long as it is
    assert all(len(line) <= width for line in table if sharded.path not in line)
    names = {"self_attn.qkv_proj.weight", "weights_rank3.safetensors", "model.norm.weight"}
    assert names <= {word for line in table for word in line.split()}


def test_without_unicode_it_is_ascii(sharded: Contents) -> None:
    assert table_of(sharded, width=None, is_unicode=False).isascii()


def test_a_file_that_is_not_there_is_shown_as_missing(model: Path, tmp_path: Path) -> None:
    command = ShardCommand(source=str(model), destination=str(tmp_path / "x"), tensor_parallel_size=2)
    shard(command, lambda _: lambda _: None)
    (tmp_path / "x" / "weights_rank1.safetensors").unlink()
    contents = contents_of(tmp_path / "x")
    assert [file.is_there for file in contents.files] == [True, False]
    assert any(line.split()[:2] == ["weights_rank1.safetensors", "missing"] for line in lines(contents))


def test_a_hugging_face_directory_is_shown_too_in_the_order_of_its_layers(tmp_path: Path) -> None:
    contents = contents_of(random_llama(tmp_path / "model", 2, num_hidden_layers=12))
    table = lines(contents)
    assert "  model.layers.0 … 11" in table
    assert table.count("Files                size") == 1
    assert contents.tp_size is None


def test_a_model_that_is_not_served_can_be_looked_at(model: Path, tmp_path: Path) -> None:
    config = {**json.loads((model / "config.json").read_text()), "architectures": ["Other"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    contents = contents_of(tmp_path)
    assert contents.tensor_parallel_sizes is None
    assert any(line.startswith("architecture Other, 2 layers") for line in lines(contents))


def test_json_has_all_of_it(sharded: Contents) -> None:
    document = json.loads(sharded.to_json())
    assert document["parameters"] == sharded.parameters
    (entry,) = [tensor for tensor in document["tensors"] if tensor["name"] == "model.embed_tokens.weight"]
    assert entry["files"] == [f"weights_rank{rank}.safetensors" for rank in range(4)]
    assert entry["parts"][0]["num_shards"] == 4


def test_names_do_nothing_to_a_terminal(sharded: Contents) -> None:
    evil = replace(sharded, path="a\nb", name="\x1b[2Jname", extra={"\x1b]0;title\x07": "\x9b1m"})
    table = table_of(evil, width=None)
    assert all(line.isprintable() for line in table.splitlines())
    assert table.startswith("a?b: a distributed checkpoint")
    assert "name         ?[2Jname" in table
