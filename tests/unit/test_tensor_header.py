"""Headers of safetensors files: what is written, and every way in which one that is read can be wrong."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from engine.checkpoint.tensor_header import (
    ALIGNMENT,
    TORCH_DTYPES,
    header_length,
    is_filler,
    make_header,
    parse_header,
)

TENSORS = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: not name.startswith("__")),
        st.sampled_from(sorted(TORCH_DTYPES)),
        st.lists(st.integers(0, 7), max_size=4).map(tuple),
    ),
    unique_by=lambda entry: entry[0],
    max_size=8,
)


def file_of(header: object, data: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def entry(start: int = 0, stop: int = 8, **others: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [start, stop], **others}


def parse(content: bytes) -> dict[str, Any]:
    return dict(parse_header(content, len(content)))


@given(TENSORS)
def test_every_tensor_begins_at_a_multiple_of_64_and_there_are_no_holes(
    tensors: list[tuple[str, str, tuple[int, ...]]],
) -> None:
    header, places = make_header(tensors, {"format": "pt"})
    assert len(header) % ALIGNMENT == 0
    end = len(header)
    for name, place in places.items():
        assert place.start == end
        assert is_filler(name) or place.start % ALIGNMENT == 0
        assert is_filler(name) or place.num_bytes == math.prod(place.shape) * TORCH_DTYPES[place.dtype].itemsize
        assert not is_filler(name) or 0 < place.num_bytes < ALIGNMENT
        end = place.stop
    assert [name for name in places if not is_filler(name)] == [name for name, _, _ in tensors]
    assert parse_header(header, end) == places
    deserialize(header + bytes(end - len(header)))  # type: ignore[no-untyped-call]  # the stock library takes it


@given(TENSORS)
def test_without_alignment_there_are_no_fillers(tensors: list[tuple[str, str, tuple[int, ...]]]) -> None:
    _, places = make_header(tensors, {}, alignment=1)
    assert not any(map(is_filler, places))


@pytest.mark.parametrize("name", ["__pad_3", "__metadata__"])
def test_names_that_are_kept_for_something_else_are_not_written(name: str) -> None:
    with pytest.raises(ValueError, match=f"tensor {name} needs another name"):
        make_header([(name, "F32", (1,))], {})


def test_types_that_are_not_read_do_not_keep_others_from_being_read() -> None:
    places = parse(file_of({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}, "b": entry(8, 16)}, 16))
    assert [place.dtype for place in places.values()] == ["C64", "F32"]


BAD: list[tuple[bytes, str]] = [
    (b"", "has only 0 bytes"),
    (b"\0\0\0", "has only 3 bytes"),
    (bytes(8), "is no JSON object"),
    (b"\xff" * 8, "its header would have 18446744073709551615 of the file's 8 bytes"),
    ((10**9).to_bytes(8, "little") + b"{}", "its header would have 1000000000 of the file's 10 bytes"),
    (file_of(b"[]"), "is no JSON object"),
    (file_of(b" {}"), "is no JSON object"),
    (file_of(b"\xef\xbb\xbf{}"), "is no JSON object"),
    (file_of("{}".encode("utf-16")), "is no JSON object"),
    (file_of(b"{"), "is no JSON"),
    (file_of(b'{"a\xff": 1}'), "is no JSON"),
    (file_of(b'{"a":' * 100_000), "is no JSON"),
    (file_of(b'{"a":' + b"9" * 5000 + b"}"), "is no JSON"),
    (file_of(b'{"\\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'), "is no JSON"),
    (file_of(b'{"a": 1, "a": 2}'), "a is there twice"),
    (file_of(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), "dtype is there twice"),
    (file_of(b'{"__metadata__": {"x": NaN}}'), "it has NaN"),
    (file_of(b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 0]}}'), "it has Infinity"),
    (file_of({"a": 1}), "no dtype, shape and data_offsets for tensor a"),
    (file_of({"a": []}), "no dtype, shape and data_offsets for tensor a"),
    (file_of({"a": {}}), "no dtype, shape and data_offsets for tensor a"),
    (file_of({"a": entry(data_offsets=[0])}, 8), "no dtype, shape and data_offsets for tensor a"),
    (file_of({"a": entry(data_offsets=[0, 1, 2])}, 8), "no dtype, shape and data_offsets for tensor a"),
    (file_of({"a": entry(data_offsets="ab")}, 8), "no usable"),
    (file_of({"a": entry(dtype=3)}, 8), "no usable"),
    (file_of({"a": entry(shape="2")}, 8), "no usable"),
    (file_of({"a": entry(shape=[2.0])}, 8), "no usable"),
    (file_of({"a": entry(shape=[True, 2])}, 8), "no usable"),
    (file_of({"a": entry(shape=[-1, -2])}, 8), "no usable"),
    (file_of({"a": entry(shape=[10**4000, 0])}, 8), "no usable"),
    (file_of({"a": entry(shape=[1] * 65)}, 8), "no usable"),
    (file_of({"a": entry(-8, 0)}, 8), "no usable"),
    (file_of({"a": entry(8, 0)}, 8), "tensor a has -8 bytes"),
    (file_of({"a": entry(shape=[3])}, 8), r"tensor a has 8 bytes, which is not F32 of shape \[3\]"),
    (file_of({"a": entry(shape=[2**62, 2**62])}, 8), "tensor a has 8 bytes"),
    (file_of({"a": entry(4, 12)}, 12), "tensor a begins at byte"),
    (file_of({"a": entry(), "b": entry(16, 24)}, 24), "tensor b begins at byte"),
    (file_of({"a": entry(), "b": entry(4, 12)}, 12), "tensor b begins at byte"),
    (file_of({"a": entry(), "b": entry()}, 8), "tensor b begins at byte"),
    (file_of({"a": entry()}, 7), "and its header speaks of"),
    (file_of({"a": entry()}, 9), "and its header speaks of"),
]


@pytest.mark.parametrize(("content", "problem"), BAD)
def test_a_header_that_cannot_be_right_is_refused(content: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        parse(content)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@settings(max_examples=300)
@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_what_the_stock_library_refuses_is_refused(position: int, draw: random.Random) -> None:
    """One byte of the header is another: it is refused, or read as the stock library reads it."""
    content = bytearray(save({"a": torch.ones(2), "b": torch.ones(3, 1, dtype=torch.int8)}, {"format": "pt"}))
    header_end = 8 + header_length(bytes(content), len(content))
    content[position % header_end] = draw.randrange(256)
    try:
        stock = dict(deserialize(bytes(content)))  # type: ignore[no-untyped-call]
    except SafetensorError:
        stock = None
    try:
        own = parse(bytes(content))
    except ValueError:
        return
    if any(place.dtype not in TORCH_DTYPES for place in own.values()):  # refused when it is to be read
        return
    assert stock is not None, bytes(content)
    assert own.keys() == stock.keys()
    for name, place in own.items():
        assert list(place.shape) == stock[name]["shape"]
        assert bytes(content[place.start : place.stop]) == bytes(stock[name]["data"])


def test_a_large_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write((200 << 20).to_bytes(8, "little"))
        file.truncate(300 << 20)
    with path.open("rb") as file, pytest.raises(ValueError, match="its header would have 209715200"):
        header_length(file.read(8), 300 << 20)
