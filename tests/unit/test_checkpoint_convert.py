"""`shard` and `export`: what they write, and what they refuse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.convert import shard, with_dtype
from engine.checkpoint.export import export
from engine.checkpoint.metadata import CheckpointMetadata
from engine.checkpoint.tensor_file import TensorFile
from engine.protocol.commands import ExportCommand, ShardCommand
from engine.protocol.config import EMBEDDED_MODEL
from tests.checkpoints import random_llama


class Counted:
    """Counts what is done, as a progress bar would."""

    def __init__(self) -> None:
        self.total = self.done = 0

    def start(self, total: int) -> Callable[[int], None]:
        self.total = total
        return self._advance

    def _advance(self, count: int) -> None:
        self.done += count


def to_shards(source: Path, destination: Path, tp_size: int = 2, **options: Any) -> CheckpointMetadata:
    command = ShardCommand(
        source=str(source), destination=str(destination), tensor_parallel_size=tp_size, progress=False, **options
    )
    return shard(command, Counted().start)


def to_huggingface(source: Path, destination: Path, **options: Any) -> list[str]:
    command = ExportCommand(source=str(source), destination=str(destination), progress=False, **options)
    return export(command, Counted().start)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Llama of float32 with 4 query and 2 KV heads, tied, to break."""
    return random_llama(tmp_path / "model", 1)


def rewrite(path: Path, **changed: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def hidden_size(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["hidden_size"])


def vocab_size(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def change(model: Path, **tensors: torch.Tensor | None) -> None:
    """Put tensors in place of others, or beside them; None takes one away. Dots are written as double underscores."""
    path = model / "model.safetensors"
    changed = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = {**load_file(path), **changed}
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, path, {"format": "pt"})


# --- what is written -------------------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        to_shards(model, tmp_path / name)
    first, second = (sorted((tmp_path / name).iterdir()) for name in ("first", "second"))
    assert [path.name for path in first] == [path.name for path in second]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_the_metadata_says_what_was_written(model: Path, tmp_path: Path) -> None:
    metadata = to_shards(model, tmp_path / "sharded")
    assert metadata == CheckpointMetadata.read(tmp_path / "sharded")
    assert metadata.model_name == "model"
    assert metadata.config == json.loads((model / "config.json").read_text())
    assert metadata.model_size == sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    assert (metadata.dtype, metadata.tp_size, metadata.step) == ("float32", 2, 0)
    assert [file.name for file in metadata.files] == ["weights_rank0.safetensors", "weights_rank1.safetensors"]
    assert [file.size for file in metadata.files] == [
        (tmp_path / "sharded" / file.name).stat().st_size for file in metadata.files
    ]


def test_a_name_can_be_given(model: Path, tmp_path: Path) -> None:
    assert to_shards(model, tmp_path / "sharded", model_name="org/name").model_name == "org/name"


def test_name_step_and_extras_of_a_distributed_source_stay(model: Path, tmp_path: Path) -> None:
    to_shards(model, tmp_path / "first")
    rewrite(tmp_path / "first" / "metadata.json", model_name="mine", step=7, extra={"loss": 1.5})
    metadata = to_shards(tmp_path / "first", tmp_path / "second", 1)
    assert (metadata.model_name, metadata.step, metadata.extra) == ("mine", 7, {"loss": 1.5})


def test_of_a_directory_of_steps_the_latest_is_taken(model: Path, tmp_path: Path) -> None:
    for step in (9, 10):
        to_shards(model, tmp_path / "steps" / f"model-step-{step}")
        rewrite(tmp_path / "steps" / f"model-step-{step}" / "metadata.json", step=step)
    assert to_shards(tmp_path / "steps", tmp_path / "sharded").step == 10


def test_tokenizer_and_the_other_texts_come_along(tmp_path: Path) -> None:
    to_shards(EMBEDDED_MODEL, tmp_path / "sharded")
    to_huggingface(tmp_path / "sharded", tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        for directory in ("sharded", "again"):
            assert (tmp_path / directory / name).read_bytes() == (EMBEDDED_MODEL / name).read_bytes()
    assert not (tmp_path / "sharded" / "config.json").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_converted_and_the_configuration_says_so(model: Path, tmp_path: Path, dtype: str) -> None:
    metadata = to_shards(model, tmp_path / "sharded", dtype=dtype)
    assert (metadata.dtype, metadata.config["dtype"]) == (dtype, dtype)
    to_huggingface(tmp_path / "sharded", tmp_path / "again")
    expected, written = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "again"))
    assert all(torch.equal(written[name], expected[name].to(getattr(torch, dtype))) for name in expected)


def test_auto_leaves_each_tensor_in_its_type(model: Path, tmp_path: Path) -> None:
    norm = torch.linspace(0, 1, hidden_size(model)).bfloat16()
    change(model, model__norm__weight=norm)
    metadata = to_shards(model, tmp_path / "sharded")
    assert {tensor.dtype for tensor in metadata.tensors} == {"F32", "BF16"}
    to_huggingface(tmp_path / "sharded", tmp_path / "again")
    assert torch.equal(load_file(tmp_path / "again" / "model.safetensors")["model.norm.weight"], norm)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"dtype": "float32"}, {"dtype": "float16"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "float16"}),
        ({"dtype": None, "torch_dtype": "float32"}, {"dtype": None, "torch_dtype": "float16"}),
        ({}, {"dtype": "float16"}),
    ],
)
def test_the_configuration_keeps_its_spelling_of_the_type(written: dict[str, Any], expected: dict[str, Any]) -> None:
    assert with_dtype(written, "float16") == expected


def test_files_are_no_larger_than_asked_for(tmp_path: Path) -> None:
    metadata = to_shards(EMBEDDED_MODEL, tmp_path / "sharded", max_file_size=2**21)
    assert len(metadata.files) == 2 * 3
    assert {file.name for file in metadata.files_of(1)} == {
        f"weights_rank1-0000{index}-of-00003.safetensors" for index in (1, 2, 3)
    }
    assert all((tmp_path / "sharded" / file.name).stat().st_size <= 2**21 for file in metadata.files)
    to_huggingface(tmp_path / "sharded", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_all_that_is_announced_is_done(model: Path, tmp_path: Path) -> None:
    counted = Counted()
    shard(ShardCommand(source=str(model), destination=str(tmp_path / "x"), tensor_parallel_size=4), counted.start)
    assert counted.done == counted.total > 0
    counted = Counted()
    export(ExportCommand(source=str(tmp_path / "x"), destination=str(tmp_path / "y")), counted.start)
    assert counted.done == counted.total > 0


def test_tensors_lie_at_multiples_of_64_bytes_but_in_an_export_nothing_fills_gaps(model: Path, tmp_path: Path) -> None:
    to_shards(model, tmp_path / "sharded")
    to_huggingface(tmp_path / "sharded", tmp_path / "again")
    ours = TensorFile(tmp_path / "sharded" / "weights_rank1.safetensors")
    assert all(ours.places[name].start % 64 == 0 for name in ours.names)
    theirs = TensorFile(tmp_path / "again" / "model.safetensors")
    assert len(theirs.places) == len(theirs.names)


# --- what is refused -------------------------------------------------------------------------------------------------


def misshape(model: Path) -> None:
    change(model, model__norm__weight=torch.zeros(5))


def truncate(model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing tensor": (
        lambda model: change(model, model__norm__weight=None),
        r"model\.safetensors: tensor model\.norm\.weight is missing",
    ),
    "an extra tensor": (
        lambda model: change(model, model__layers__0__adapter=torch.zeros(3)),
        r"model\.safetensors: the model that config\.json describes has no place for tensor model\.layers\.0\.adapter",
    ),
    "a wrong shape": (misshape, r"model\.safetensors: tensor model\.norm\.weight has shape \[5\], but config\.json"),
    "a type that is not read": (
        lambda model: change(model, model__norm__weight=torch.zeros(hidden_size(model), dtype=torch.int8)),
        r"model\.safetensors: tensor model\.norm\.weight is of type I8; read are",
    ),
    "a truncated file": (truncate, r"model\.safetensors: is no whole safetensors file"),
    "tied tensors that differ": (
        lambda model: change(model, lm_head__weight=torch.ones(vocab_size(model), hidden_size(model))),
        r"tensor lm_head\.weight differs from model\.embed_tokens\.weight",
    ),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), r"has neither model\.safetensors nor"),
    "no configuration": (
        lambda model: (model / "config.json").unlink(),
        r"has neither config\.json nor metadata\.json",
    ),
    "an unknown architecture": (
        lambda model: rewrite(model / "config.json", architectures=["NobodyForCausalLM"]),
        r"config\.json: architectures names NobodyForCausalLM",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_source_is_refused_and_leaves_nothing(broken: str, model: Path, tmp_path: Path) -> None:
    spoil, expected = BROKEN[broken]
    spoil(model)
    for convert in (to_shards, to_huggingface):
        with pytest.raises(ValueError, match=expected):
            convert(model, tmp_path / "new" / "destination")
    assert not (tmp_path / "new" / "destination").exists()
    assert not (tmp_path / "new").exists() or list((tmp_path / "new").iterdir()) == []


def test_a_number_of_ranks_that_does_not_divide_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--tensor-parallel-size 3 does not divide the model's 4 attention heads"):
        to_shards(model, tmp_path / "sharded", 3)


def test_values_that_float16_cannot_hold_are_refused(model: Path, tmp_path: Path) -> None:
    change(
        model, model__norm__weight=torch.full((json.loads((model / "config.json").read_text())["hidden_size"],), 7e4)
    )
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor model\.norm\.weight has values that float16"):
        to_shards(model, tmp_path / "sharded", dtype="float16")
    assert not (tmp_path / "sharded").exists()


def test_a_damaged_distributed_source_is_refused(model: Path, tmp_path: Path) -> None:
    to_shards(model, tmp_path / "sharded")
    (tmp_path / "sharded" / "weights_rank1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights_rank1\.safetensors: is missing; metadata\.json names it"):
        to_huggingface(tmp_path / "sharded", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("convert", [to_shards, to_huggingface])
def test_what_is_there_is_never_touched(convert: Callable[..., object], model: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "file").write_text("kept")
    with pytest.raises(ValueError, match=r"there: is there already; nothing is overwritten"):
        convert(model, there)
    assert (there / "file").read_text() == "kept"
    with pytest.raises(ValueError, match=r"nnn: cannot be written: File name too long$"):
        convert(model, tmp_path / ("n" * 300))
    before = sorted(path.name for path in model.iterdir())
    with pytest.raises(ValueError, match=r"is the checkpoint that is read"):
        convert(model, model / ".." / "model")
    with pytest.raises(ValueError, match=r"is inside .*model, which is read"):
        convert(model, model / "sharded")
    assert sorted(path.name for path in model.iterdir()) == before
