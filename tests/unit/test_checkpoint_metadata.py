"""`metadata.json`: what goes in comes out, and whatever is wrong is refused by name."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoint.metadata import FORMAT_VERSION, CheckpointMetadata, FileMetadata, TensorMetadata, file_name
from engine.checkpoint.tensor_header import TORCH_DTYPES
from engine.parallel.base import ShardPart
from engine.protocol.model_directory import METADATA_FILE

texts = st.text(max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(texts, json_values, max_size=4)


@st.composite
def parts_of(draw: st.DrawFn, tp_size: int) -> tuple[ShardPart, ...]:
    parts = []
    for source in draw(st.lists(st.sampled_from(("", "q", "k", "ü é")), max_size=3, min_size=1, unique=True)):
        num_shards = draw(st.sampled_from([n for n in range(1, tp_size + 1) if tp_size % n == 0]))
        global_size = draw(st.integers(0, 40))
        padded_size = math.ceil(global_size / num_shards) * num_shards
        parts.append(ShardPart(source, global_size, padded_size, num_shards))
    return tuple(parts)


@st.composite
def tensors_of(draw: st.DrawFn, name: str, tp_size: int, files_per_rank: int) -> TensorMetadata:
    shape = draw(st.lists(st.integers(0, 50), max_size=4))
    dim = draw(st.sampled_from((None, *range(len(shape)))))
    parts: tuple[ShardPart, ...] = ()
    if dim is not None:
        parts = draw(parts_of(tp_size))
        shape[dim] = sum(part.global_size for part in parts)
    return TensorMetadata(
        name=name,
        dtype=draw(st.sampled_from(list(TORCH_DTYPES))),
        shape=tuple(shape),
        dim=dim,
        parts=parts,
        file_index=draw(st.integers(0, files_per_rank - 1)),
    )


@st.composite
def checkpoints(draw: st.DrawFn) -> CheckpointMetadata:
    tp_size, count = draw(st.sampled_from([1, 2, 3, 4, 6, 128])), draw(st.integers(1, 3))
    files = [
        FileMetadata(
            name=file_name(rank, index, count),
            rank=rank,
            index=index,
            size=draw(st.integers(0, 2**50)) if rank < 4 else 0,
            xxh3_128="0" * 32,
        )
        for rank in range(tp_size)
        for index in range(count)
    ]
    names = [f"{index}.qkv.{text}" for index, text in enumerate(draw(st.lists(texts, max_size=5)))]
    return CheckpointMetadata(
        model_name=draw(texts),
        config=draw(json_objects),
        step=draw(st.integers(0, 2**62)),
        extra=draw(json_objects),
        model_size=draw(st.integers(0, 2**50)),
        dtype=draw(texts),
        tp_size=tp_size,
        files=tuple(files),
        tensors=tuple(draw(tensors_of(name, tp_size, count)) for name in names),
    )


@given(checkpoints())
def test_what_goes_in_comes_out(metadata: CheckpointMetadata) -> None:
    content = metadata.to_dict()
    assert CheckpointMetadata.from_dict(content) == metadata
    assert CheckpointMetadata.from_dict(json.loads(json.dumps(content))) == metadata
    assert CheckpointMetadata.parse(metadata.to_json(), Path("it")) == metadata


@given(checkpoints())
def test_every_tensor_is_in_one_file_of_each_rank(metadata: CheckpointMetadata) -> None:
    for rank in range(metadata.tp_size):
        files = metadata.files_of(rank)
        assert [file.rank for file in files] == [rank] * len(files)
        assert sum(len(list(metadata.tensors_in(file))) for file in files) == len(metadata.tensors)
    for tensor in metadata.tensors:
        assert tensor in metadata.tensors_in(metadata.file_of(tensor, 0))


@given(st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()))
def test_anything_else_is_an_error_that_names_the_file(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^some/metadata.json: "):
        CheckpointMetadata.parse(content, Path("some/metadata.json"))


PART = {"source": "", "global_size": 6, "padded_size": 8, "num_shards": 2}
CONTENT: dict[str, Any] = {
    "format_version": 1,
    "model_name": "mine",
    "tp_size": 2,
    "files": [
        {"name": f"weights_rank{rank}.safetensors", "rank": rank, "index": 0, "size": 10, "xxh3_128": "ab"}
        for rank in (0, 1)
    ],
    "tensors": [
        {"name": "w", "dtype": "F32", "shape": [6, 3], "dim": 0, "parts": [PART]},
        {"name": "norm", "dtype": "BF16", "shape": [3]},
    ],
}


def test_the_rest_may_be_left_out() -> None:
    metadata = CheckpointMetadata.from_dict(CONTENT)
    assert (metadata.config, metadata.step, metadata.extra) == ({}, 0, {})
    assert [tensor.local_shape for tensor in metadata.tensors] == [(4, 3), (3,)]
    assert metadata.weight_bytes == 4 * 3 * 4 + 3 * 2


def set_in(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Return what sets the value that is the last of `path`, at the place that the others lead to."""
    *way, last, value = path

    def change(content: Any) -> None:
        for key in way:
            content = content[key]
        content[last] = value

    return change


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    *way, last = path

    def change(content: Any) -> None:
        for key in way:
            content = content[key]
        del content[last]

    return change


def copy_of(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Return what puts a list's first item into it once more."""

    def change(content: Any) -> None:
        for key in path:
            content = content[key]
        content.append(content[0])

    return change


FILE, OTHER, TENSOR, NORM = ("files", 0), ("files", 1), ("tensors", 0), ("tensors", 1)
PLACE = (*TENSOR, "parts", 0)
WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no version": (drop("format_version"), "has no format_version: it is no distributed checkpoint's"),
    "a version that is text": (set_in("format_version", "1"), "has no format_version"),
    "a version that is a truth value": (set_in("format_version", True), "has no format_version"),
    "version 0": (set_in("format_version", 0), "has no format_version"),
    "a newer version": (
        set_in("format_version", FORMAT_VERSION + 1),
        f"format_version {FORMAT_VERSION + 1} is newer than {FORMAT_VERSION}, the newest that is known here",
    ),
    "no name": (drop("model_name"), "`model_name`"),
    "no rank": (set_in("tp_size", 0), "tp_size must be between 1 and 1024, not 0"),
    "too many ranks": (set_in("tp_size", 2000), "tp_size must be between 1 and 1024, not 2000"),
    "a negative step": (set_in("step", -1), "step must not be negative: -1"),
    "a config that is a list": (set_in("config", []), r"`\$.config`"),
    "no file of a rank": (drop(*OTHER), "files: must be the same number for each of 2 ranks"),
    "two files of one rank": (set_in(*OTHER, "rank", 0), "files: must be the same number for each of 2 ranks"),
    "a file too many": (copy_of("files"), "files: must be the same number for each of 2 ranks"),
    "an index that is left out": (set_in(*FILE, "index", 1), "files: must be the same number for each of 2 ranks"),
    "a file for two ranks": (set_in(*OTHER, "name", "weights_rank0.safetensors"), "files: two have the same name"),
    "a file without a checksum": (drop(*FILE, "xxh3_128"), r"`xxh3_128` - at `\$\.files\[0\]`"),
    "a negative size of a file": (set_in(*FILE, "size", -1), "files: weights_rank0.safetensors cannot have -1 bytes"),
    "a file elsewhere": (set_in(*FILE, "name", "../other/x"), "files: must be in the same directory, not '../other/x'"),
    "a file at the root": (set_in(*FILE, "name", "/etc/passwd"), "files: must be in the same directory"),
    "the parent as a file": (set_in(*FILE, "name", ".."), "files: must be in the same directory, not '..'"),
    "the directory as a file": (set_in(*FILE, "name", "."), "files: must be in the same directory, not '.'"),
    "a file without a name": (set_in(*FILE, "name", ""), "files: must be in the same directory, not ''"),
    "a name with a zero byte": (set_in(*FILE, "name", "a\0b"), "files: must be in the same directory, not 'a"),
    "an unknown layout": (set_in(*TENSOR, "layout", "packed"), "tensor w has layout 'packed'; known: row_major"),
    "an unknown type": (set_in(*TENSOR, "dtype", "F31"), "tensor w is of type 'F31'; known: F64, "),
    "a negative dimension": (set_in(*NORM, "shape", [-3]), r"tensor norm has shape \[-3\]"),
    "an endless dimension": (set_in(*NORM, "shape", [2**31]), r"tensor norm has shape \[2147483648\]"),
    "a fraction of a dimension": (
        set_in(*NORM, "shape", [1.5]),
        r"`float` - at `\$\.tensors\[1\]\.shape\[0\]`",
    ),
    "a file that is not there": (set_in(*NORM, "file_index", 1), "tensor norm is in file 1 of each rank, which has 1"),
    "a file before the first": (set_in(*NORM, "file_index", -1), "tensor norm is in file -1 of each rank, which has 1"),
    "a tensor twice": (copy_of("tensors"), "tensor w is there twice"),
    "parts of a whole tensor": (set_in(*NORM, "parts", [PART]), "tensor norm is whole, but has parts"),
    "a cut where no dimension is": (set_in(*TENSOR, "dim", 2), "tensor w is cut along dimension 2 of 2"),
    "a cut before the first dimension": (set_in(*TENSOR, "dim", -1), "tensor w is cut along dimension -1 of 2"),
    "parts that do not add up": (
        set_in(*TENSOR, "shape", [7, 3]),
        "tensor w has parts of 6 together, but 7 in its shape",
    ),
    "no parts": (set_in(*TENSOR, "parts", []), "tensor w has parts of 0 together, but 6 in its shape"),
    "less padded than it is": (set_in(*PLACE, "padded_size", 4), "tensor w cannot be cut as parts says"),
    "runs of unequal length": (set_in(*PLACE, "padded_size", 7), "tensor w cannot be cut as parts says"),
    "more runs than ranks": (set_in(*PLACE, "num_shards", 4), "tensor w cannot be cut as parts says"),
    "no runs": (set_in(*PLACE, "num_shards", 0), "tensor w cannot be cut as parts says"),
    "a negative part": (set_in(*PLACE, "global_size", -6), "tensor w cannot be cut as parts says"),
    "a part without a module": (set_in(*PLACE, "source", "q"), "tensor w has a part 'q', but no module"),
    "endless padding": (set_in(*PLACE, "padded_size", 2**40), "tensor w cannot be cut as parts says"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, case: str) -> None:
    change, problem = WRONG[case]
    content = copy.deepcopy(CONTENT)
    change(content)
    (tmp_path / METADATA_FILE).write_bytes(msgspec.json.encode(content))
    with pytest.raises(ValueError, match=f"^{tmp_path}/metadata.json: .*{problem}"):
        CheckpointMetadata.read(tmp_path)


def test_two_parts_of_one_name_are_refused(tmp_path: Path) -> None:
    """Another tensor's part would be read in the place of this one's."""
    content = copy.deepcopy(CONTENT)
    content["tensors"][0].update(shape=[12, 3], name="qkv.weight", parts=[{**PART, "source": "q"}] * 2)
    (tmp_path / METADATA_FILE).write_bytes(msgspec.json.encode(content))
    with pytest.raises(ValueError, match=r"metadata.json: tensor q.weight is there twice$"):
        CheckpointMetadata.read(tmp_path)


def test_a_part_of_another_tensors_name_is_refused(tmp_path: Path) -> None:
    content = copy.deepcopy(CONTENT)
    content["tensors"][0].update(name="qkv.weight", parts=[{**PART, "source": "q"}])
    content["tensors"][1].update(name="q.weight")
    (tmp_path / METADATA_FILE).write_bytes(msgspec.json.encode(content))
    with pytest.raises(ValueError, match=r"metadata.json: tensor q.weight is there twice$"):
        CheckpointMetadata.read(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{tmp_path}/metadata.json: cannot be read: No such file or directory$"):
        CheckpointMetadata.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b'{"format_version": 1e999}', b"\xff"])
def test_a_file_that_is_no_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / METADATA_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/metadata.json: "):
        CheckpointMetadata.read(tmp_path)


def test_names_of_files_tell_rank_and_place() -> None:
    assert file_name(3) == "weights_rank3.safetensors"
    assert file_name(3, 1, 12) == "weights_rank3-00002-of-00012.safetensors"
