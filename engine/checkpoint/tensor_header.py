"""The header of a safetensors file: which tensors are where in it.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the header's length N, little-endian; N
bytes of JSON with type, shape and place of each tensor; then the tensors' bytes, row by row, without holes. Tensors lie
where they are used: files that are mapped need no copy if each begins at a multiple of `ALIGNMENT`, so the header is
padded with spaces, and what would be a hole between two tensors is a tensor of its own, a filler.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
LENGTH_BYTES = 8
LARGEST_HEADER = 100 * 2**20  # bytes, as in the stock library
FILLER_PREFIX = "__pad_"
METADATA_KEY = "__metadata__"
LARGEST_NUMBER = 2**63 - 1
MOST_DIMENSIONS = 64  # as in torch
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorPlace:
    """One tensor: its type as safetensors spells it, its shape, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self.stop - self.start


def parse_header(content: bytes, file_size: int) -> dict[str, TensorPlace]:
    """Return the place of each tensor in the file, fillers included, in the order of their bytes.

    Args:
        content: the file's first bytes, up to the end of its header at least.
        file_size: in bytes.

    Raises:
        ValueError: saying what is wrong with the header, or that the file is shorter or longer than it says.
    """
    data_start = LENGTH_BYTES + header_length(content, file_size)
    header = _decode(content[LENGTH_BYTES:data_start])
    header.pop(METADATA_KEY, None)
    places = {name: _place(name, entry, data_start) for name, entry in header.items()}
    places = dict(sorted(places.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = data_start
    for name, place in places.items():
        if place.start != end:
            raise ValueError(f"tensor {name} begins at byte {place.start}, where the one before ends at {end}")
        end = place.stop
    if end != file_size:
        raise ValueError(f"it has {file_size} bytes, and its header speaks of {end}")
    return places


def parse_texts(content: bytes, file_size: int) -> dict[str, str]:
    """Return the texts that the header holds beside the tensors.

    Raises:
        ValueError: see `parse_header`; what holds no texts is passed over.
    """
    header = _decode(content[LENGTH_BYTES : LENGTH_BYTES + header_length(content, file_size)])
    texts = header.get(METADATA_KEY)
    return {name: text for name, text in texts.items() if isinstance(text, str)} if isinstance(texts, dict) else {}


def header_length(content: bytes, file_size: int) -> int:
    """Return the length in bytes of the header behind the file's first eight bytes.

    Raises:
        ValueError: if that is none, or more than the file holds.
    """
    if len(content) < LENGTH_BYTES:
        raise ValueError(f"it has only {len(content)} bytes")
    length = int.from_bytes(content[:LENGTH_BYTES], "little")
    if length > LARGEST_HEADER or LENGTH_BYTES + length > file_size:
        raise ValueError(f"its header would have {length} of the file's {file_size} bytes")
    return length


def _decode(content: bytes) -> dict[str, Any]:
    """Take nothing that other readers of the format refuse, or may understand otherwise."""
    if not content.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    try:
        header: dict[str, Any] = json.loads(
            content.decode(), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
        "".join(header).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is no JSON: {error}") from error
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return entries


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it has {name}")


def _place(name: str, entry: Any, data_start: int) -> TensorPlace:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"its header has no dtype, shape and data_offsets for tensor {name}") from error
    is_usable = isinstance(dtype, str) and len(shape) <= MOST_DIMENSIONS
    if not is_usable or not all(type(n) is int and 0 <= n <= LARGEST_NUMBER for n in (*shape, start, stop)):
        raise ValueError(f"its header has no usable dtype, shape and data_offsets for tensor {name}")
    known = TORCH_DTYPES.get(dtype)
    if start > stop or (known is not None and stop - start != math.prod(shape) * known.itemsize):
        raise ValueError(f"tensor {name} has {stop - start} bytes, which is not {dtype} of shape {list(shape)}")
    return TensorPlace(dtype, shape, data_start + start, data_start + stop)


def make_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str], alignment: int = ALIGNMENT
) -> tuple[bytes, dict[str, TensorPlace]]:
    """Lay tensors out one after the other, each at a multiple of `alignment` in the file.

    Args:
        tensors: name, type as safetensors spells it, and shape of each.
        metadata: texts for the header.
        alignment: bytes; with 1 there are no fillers.

    Returns:
        The file's first bytes, and the place of each tensor, fillers included, in order.

    Raises:
        ValueError: naming a tensor whose name the format keeps for something else.
    """
    offsets: dict[str, TensorPlace] = {}  # from the end of the header
    end = 0
    for name, dtype, shape in tensors:
        if is_filler(name) or name == METADATA_KEY:
            raise ValueError(f"tensor {name} needs another name: this one is kept for what is no tensor")
        start = -(-end // alignment) * alignment
        if start != end:
            offsets[f"{FILLER_PREFIX}{len(offsets)}"] = TensorPlace("U8", (start - end,), end, start)
        end = start + math.prod(shape) * TORCH_DTYPES[dtype].itemsize
        offsets[name] = TensorPlace(dtype, shape, start, end)
    entries: dict[str, Any] = {METADATA_KEY: dict(metadata)}
    for name, place in offsets.items():
        entries[name] = {"dtype": place.dtype, "shape": place.shape, "data_offsets": (place.start, place.stop)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = -(-(LENGTH_BYTES + len(text)) // ALIGNMENT) * ALIGNMENT - LENGTH_BYTES
    header = length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length)
    places = {
        name: TensorPlace(place.dtype, place.shape, place.start + len(header), place.stop + len(header))
        for name, place in offsets.items()
    }
    return header, places


def is_filler(name: str) -> bool:
    """Whether a tensor is there only to fill what would be a hole."""
    return name.startswith(FILLER_PREFIX)
