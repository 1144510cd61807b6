"""`verify` finds everything that is wrong with a checkpoint, and names file and tensor."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.checksum import file_checksum
from engine.checkpoint.convert import shard
from engine.checkpoint.integrity import checksum_problems
from engine.checkpoint.metadata import CheckpointMetadata
from engine.checkpoint.tensor_file import TensorFile
from engine.checkpoint.verify import Verdict, verify
from engine.protocol.commands import ShardCommand
from tests.checkpoints import random_llama


def check(directory: Path) -> Verdict:
    return verify(directory, lambda _: lambda _: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama whose vocabulary is padded at 4 ranks, which share 2 KV heads."""
    return random_llama(tmp_path_factory.mktemp("hf") / "model", 1)


@pytest.fixture(scope="module")
def whole(model: Path) -> Path:
    destination = model.parent / "sharded"
    command = ShardCommand(source=str(model), destination=str(destination), tensor_parallel_size=4)
    shard(command, lambda _: lambda _: None)
    return destination


@pytest.fixture
def sharded(whole: Path, tmp_path: Path) -> Path:
    """A copy of the distributed checkpoint, to break."""
    return Path(shutil.copytree(whole, tmp_path / "sharded"))


@pytest.fixture
def huggingface(model: Path, tmp_path: Path) -> Path:
    """A copy of the Hugging Face one, to break."""
    return Path(shutil.copytree(model, tmp_path / "hf"))


FILE = "weights_rank1.safetensors"
NORM = "model.norm.weight"


def overwrite(directory: Path, tensor: str, offset: int, content: bytes, file: str = FILE) -> None:
    """Change bytes of a tensor where they lie."""
    opened = TensorFile(directory / file, use_memory_map=False)
    with (directory / file).open("r+b") as stream:
        stream.seek(opened.places[tensor].start + offset)
        stream.write(content)
    opened.close()


def accept(directory: Path, file: str = FILE) -> None:
    """Have the metadata say what the file holds now, as a program would that wrote the wrong thing."""

    def rewritten(entry: dict[str, Any]) -> dict[str, Any]:
        path = directory / file
        return {**entry, "size": path.stat().st_size, "xxh3_128": file_checksum(path)}

    edit(directory, lambda it: it.update(files=[rewritten(f) if f["name"] == file else f for f in it["files"]]))


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "metadata.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def entry_of(content: dict[str, Any], tensor: str) -> dict[str, Any]:
    return next(entry for entry in content["tensors"] if entry["name"] == tensor)


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Write a rank's file again, by another program."""
    tensors = load_file(directory / FILE)
    change(tensors)
    save_file(tensors, directory / FILE)


# --- distributed -----------------------------------------------------------------------------------------------------


def test_nothing_is_wrong_with_what_was_just_written(sharded: Path) -> None:
    verdict = check(sharded)
    assert verdict.problems == []
    assert (verdict.num_files, verdict.num_bytes) == (4, sum(p.stat().st_size for p in sharded.glob("*.safetensors")))


def flip_a_byte(directory: Path) -> None:
    path = directory / FILE
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def write_a_wrong_shape(directory: Path) -> None:
    change_tensors(directory, lambda tensors: tensors.update({NORM: torch.zeros(3)}))
    accept(directory)


def write_a_wrong_type(directory: Path) -> None:
    change_tensors(directory, lambda tensors: tensors.update({NORM: tensors[NORM].half()}))
    accept(directory)


def leave_a_tensor_out(directory: Path) -> None:
    change_tensors(directory, lambda tensors: tensors.pop(NORM))
    accept(directory)


def put_a_tensor_in(directory: Path) -> None:
    change_tensors(directory, lambda tensors: tensors.update(more=torch.zeros(3)))
    accept(directory)


def change_a_replica(directory: Path) -> None:
    overwrite(directory, NORM, 0, b"\x01\x02\x03\x04")
    accept(directory)


def change_a_replicated_head(directory: Path) -> None:
    """Ranks 0 and 1 hold the same KV head; it is the middle of the fused tensor."""
    name = "model.layers.0.self_attn.qkv_proj.weight"
    place = TensorFile(directory / FILE).places[name]
    overwrite(directory, name, place.num_bytes // 2, b"\x01\x02\x03\x04")
    accept(directory)


def change_the_padding(directory: Path) -> None:
    name, last = "model.embed_tokens.weight", "weights_rank3.safetensors"
    overwrite(directory, name, TensorFile(directory / last).places[name].num_bytes - 4, b"\x01\x02\x03\x04", last)
    accept(directory, last)


def garble_the_header(directory: Path) -> None:
    with (directory / FILE).open("r+b") as stream:
        stream.seek(8)
        stream.write(b"[")
    accept(directory)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a truncated file": (
        lambda it: os.truncate(it / FILE, 1000),
        "{}/weights_rank1.safetensors: has 1000 bytes, but metadata.json says ",
    ),
    "a flipped byte": (flip_a_byte, "{}/weights_rank1.safetensors: has checksum "),
    "a missing rank file": (
        lambda it: (it / FILE).unlink(),
        "{}/weights_rank1.safetensors: is missing; metadata.json names it as a file of rank 1",
    ),
    "a header that is none": (garble_the_header, "{}/weights_rank1.safetensors: is no whole safetensors file"),
    "a missing tensor": (leave_a_tensor_out, "{}/weights_rank1.safetensors: tensor model.norm.weight is missing"),
    "an extra tensor": (put_a_tensor_in, "{}/weights_rank1.safetensors: tensor more is not in metadata.json"),
    "a wrong shape": (
        write_a_wrong_shape,
        "{}/weights_rank1.safetensors: tensor model.norm.weight has shape [3], but metadata.json says ",
    ),
    "a wrong type": (
        write_a_wrong_type,
        "{}/weights_rank1.safetensors: tensor model.norm.weight is of type F16, but metadata.json says F32",
    ),
    "ranks that hold different copies": (
        change_a_replica,
        "{}/weights_rank1.safetensors: tensor model.norm.weight differs from that of another rank",
    ),
    "ranks that hold different copies of a head": (
        change_a_replicated_head,
        "{}/weights_rank1.safetensors: tensor model.layers.0.self_attn.qkv_proj.weight differs from that of another",
    ),
    "padding that is not zero": (
        change_the_padding,
        "{}/weights_rank3.safetensors: tensor model.embed_tokens.weight has padding that is not zero",
    ),
    "metadata that is no JSON": (
        lambda it: (it / "metadata.json").write_text("{"),
        "{}/metadata.json: cannot be read as JSON: ",
    ),
    "a newer format": (
        lambda it: edit(it, lambda content: content.update(format_version=2)),
        "{}/metadata.json: format_version 2 is newer than 1, the newest that is known here",
    ),
    "an unknown layout": (
        lambda it: edit(it, lambda content: entry_of(content, NORM).update(layout="packed")),
        "{}/metadata.json: tensor model.norm.weight has layout 'packed'; known: row_major",
    ),
    "a number of ranks that does not divide": (
        lambda it: edit(it, lambda content: content.update(tp_size=3)),
        "{}/metadata.json: files: must be the same number for each of 3 ranks",
    ),
    "metadata that leaves a tensor of the model out": (
        lambda it: edit(it, lambda content: content["tensors"].remove(entry_of(content, NORM))),
        "{}/metadata.json: tensor model.norm.weight is missing",
    ),
    "a configuration of another shape": (
        lambda it: edit(it, lambda content: content["config"].update(vocab_size=5)),
        "{}/weights_rank0.safetensors: tensor model.embed_tokens.weight has shape ",
    ),
    "a configuration that is none": (
        lambda it: edit(it, lambda content: content["config"].update(hidden_size="wide")),
        "{}/metadata.json: config: hidden_size must be a whole number",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named(wrong: str, sharded: Path) -> None:
    spoil, expected = WRONG[wrong]
    spoil(sharded)
    problems = check(sharded).problems
    assert any(problem.startswith(expected.format(sharded)) for problem in problems), problems
    assert all("\n" not in problem for problem in problems)
    assert len(set(problems)) == len(problems)


def test_all_problems_are_found_not_just_the_first(sharded: Path) -> None:
    flip_a_byte(sharded)
    os.truncate(sharded / "weights_rank0.safetensors", 1000)
    (sharded / "weights_rank2.safetensors").unlink()
    problems = check(sharded).problems
    assert [sum(f"weights_rank{rank}." in problem for problem in problems) for rank in range(4)] == [1, 1, 1, 0]


def test_a_file_that_cannot_be_read_keeps_no_other_from_being_checked(sharded: Path) -> None:
    broken = "weights_rank0.safetensors"
    (sharded / broken).unlink()
    (sharded / broken).symlink_to("/proc/self/mem")  # each read of its beginning fails
    edit(sharded, lambda content: next(f for f in content["files"] if f["name"] == broken).update(size=0))
    flip_a_byte(sharded)
    problems = check(sharded).problems
    assert any(problem.startswith(f"{sharded}/{broken}: cannot be read: ") for problem in problems), problems
    assert any(problem.startswith(f"{sharded}/{FILE}: has checksum ") for problem in problems), problems


def test_other_files_in_the_directory_are_worth_a_note(sharded: Path) -> None:
    (sharded / "weights_rank4.safetensors").write_text("?")
    verdict = check(sharded)
    assert verdict.problems == []
    assert f"{sharded}/weights_rank4.safetensors is no part of the checkpoint" in verdict.notes


def test_without_a_configuration_the_rest_is_verified_all_the_same(sharded: Path) -> None:
    edit(sharded, lambda content: content.update(config={}))
    verdict = check(sharded)
    assert verdict.problems == []
    assert any("has no model configuration" in note for note in verdict.notes)
    flip_a_byte(sharded)
    assert len(check(sharded).problems) == 1


def test_every_byte_is_counted_once(sharded: Path) -> None:
    counted: list[int] = []
    metadata = CheckpointMetadata.read(sharded)
    assert list(checksum_problems(sharded, metadata, counted.append)) == []
    assert sum(counted) == sum(file.size for file in metadata.files)


def test_who_counts_can_end_it(sharded: Path) -> None:
    def stop(_: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        list(checksum_problems(sharded, CheckpointMetadata.read(sharded), stop))


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def test_a_whole_hugging_face_directory_has_no_problem_but_no_checksums_either(huggingface: Path) -> None:
    verdict = check(huggingface)
    assert verdict.problems == []
    assert any("has no checksums" in note for note in verdict.notes)


def change_huggingface(directory: Path, **tensors: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    changed = {**load_file(path), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path, {"format": "pt"})


def test_every_tensor_of_a_hugging_face_directory_is_compared_with_its_configuration(huggingface: Path) -> None:
    change_huggingface(
        huggingface,
        model__norm__weight=torch.zeros(3),
        model__layers__0__input_layernorm__weight=None,
        more=torch.zeros(2),
    )
    problems = check(huggingface).problems
    assert len(problems) == 3
    for name, words in (
        ("model.norm.weight", "has shape [3]"),
        ("model.layers.0.input_layernorm.weight", "is missing"),
        ("more", "has no place for tensor more"),
    ):
        assert any(name in problem and words in problem for problem in problems), problems


def test_tied_tensors_of_a_hugging_face_directory_must_be_equal(huggingface: Path) -> None:
    embedding = load_file(huggingface / "model.safetensors")["model.embed_tokens.weight"]
    change_huggingface(huggingface, lm_head__weight=embedding.clone())
    assert check(huggingface).problems == []
    change_huggingface(huggingface, lm_head__weight=embedding + 1)
    (problem,) = check(huggingface).problems
    assert problem.startswith(f"{huggingface}/model.safetensors: tensor lm_head.weight differs from ")


def test_every_truncated_file_of_a_hugging_face_directory_is_named(huggingface: Path) -> None:
    tensors = load_file(huggingface / "model.safetensors")
    (huggingface / "model.safetensors").unlink()
    names = list(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, huggingface / file, {"format": "pt"})
        os.truncate(huggingface / file, 500)
    weight_map = {name: file for file, own in halves.items() for name in own}
    (huggingface / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    problems = check(huggingface).problems
    assert [problem.partition(": ")[0] for problem in problems] == [f"{huggingface}/{file}" for file in halves]


@pytest.mark.parametrize(("name", "value", "shown"), [("model_size", -5, "-5"), ("dtype", "nonsense", "'nonsense'")])
def test_what_the_metadata_says_of_all_tensors_together_is_compared(
    sharded: Path, name: str, value: object, shown: str
) -> None:
    path = sharded / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    [problem] = verify(sharded, lambda _total: lambda _count: None).problems
    assert problem.startswith(f"{path}: {name} is {shown}, but that of the tensors is ")
