"""Shows what is in a checkpoint as a table that a person can read: layers that are alike are shown once."""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from engine.checkpoint.contents import Contents, TensorContents
from engine.parallel.base import ShardPart
from engine.protocol.units import format_bytes, format_count

FORMS = {"distributed": "a distributed checkpoint", "huggingface": "a Hugging Face checkpoint"}
LAYER = re.compile(r"(.*?\.\d+)\.(.+)")
GAP = "  "
PLAIN = str.maketrans({"…": "-"})


@dataclass(frozen=True)
class _Row:
    """A line of cells, and lines of text below it."""

    cells: tuple[str, ...]
    indent: int = 1
    remarks: tuple[str, ...] = ()


def table_of(contents: Contents, *, width: int | None, is_unicode: bool = True) -> str:
    """Return the table.

    Args:
        contents: of a checkpoint.
        width: columns that there are; None is as many as it takes.
        is_unicode: whether `…` can be shown.
    """
    sections = [list(_summary(contents, width)), list(_files(contents, width)), list(_tensors(contents, width))]
    text = "\n\n".join("\n".join(map(harmless, lines)) for lines in sections) + "\n"
    return text if is_unicode else text.translate(PLAIN)


def harmless(line: str) -> str:
    """Return a line in which nothing moves the cursor or does other things to a terminal: names come from files."""
    return "".join(character if character.isprintable() else "?" for character in line)


def _summary(contents: Contents, width: int | None) -> Iterator[str]:
    version = "" if contents.format_version is None else f", format version {contents.format_version}"
    yield f"{contents.path}: {FORMS[contents.form]}{version}"
    yield ""
    for name, value in _facts(contents):
        yield from _wrapped(f"{name:<13}{value}", width, " " * 13)


def _facts(contents: Contents) -> Iterator[tuple[str, str]]:
    yield "name", contents.name
    if contents.step is not None:
        yield "step", str(contents.step)
    yield "architecture", f"{contents.architecture or 'not said'}{_sizes(contents)}"
    yield "parameters", format_count(contents.parameters)
    yield "type", contents.dtype or "not said"
    total = sum(file.size for file in contents.files)
    yield "size", f"{format_bytes(total)} in {_counted(len(contents.files), 'file')}"
    if contents.tp_size is not None:
        yield "cut for", _counted(contents.tp_size, "rank")
    if contents.tensor_parallel_sizes is not None:
        yield "loads on", f"{', '.join(map(str, contents.tensor_parallel_sizes))} ranks"
    for name, value in contents.extra.items():
        yield name, str(value)


def _sizes(contents: Contents) -> str:
    config = contents.config
    names = {
        "num_hidden_layers": "{} layers",
        "hidden_size": "hidden {}",
        "num_attention_heads": "{} query heads",
        "num_key_value_heads": "{} KV heads",
        "vocab_size": "vocabulary {}",
    }
    return "".join(f", {text.format(config[name])}" for name, text in names.items() if config.get(name) is not None)


# --- files -----------------------------------------------------------------------------------------------------------


def _files(contents: Contents, width: int | None) -> Iterator[str]:
    is_distributed = contents.tp_size is not None
    heading = ("Files", "size", *(("rank", "xxh3_128") if is_distributed else ()))
    rows = [_Row(heading, indent=0)]
    for file in contents.files:
        size = format_bytes(file.size) if file.is_there else "missing"
        rank = (str(file.rank), str(file.xxh3_128)) if is_distributed else ()
        rows.append(_Row((file.name, size, *rank)))
    return _lines(rows, width)


# --- tensors ---------------------------------------------------------------------------------------------------------


def _tensors(contents: Contents, width: int | None) -> Iterator[str]:
    is_distributed = contents.tp_size is not None
    rows = [_Row(("Tensors", "type", "shape", *(("cut along", "each rank") if is_distributed else ())), indent=0)]
    for names, tensors in _folded(contents):
        if names:
            rows.append(_Row((names,)))
        rows += [_tensor_row(tensor, contents.tp_size, indent=2 if names else 1) for tensor in tensors]
    return _lines(rows, width)


def _folded(contents: Contents) -> Iterator[tuple[str, list[TensorContents]]]:
    """Yield runs of layers that are alike, by the first's and the last's name, and tensors outside of layers."""
    run: list[str] = []
    last: list[TensorContents] = []
    for layer, group in groupby(_in_order(contents), key=_layer_of):
        tensors = [replace(tensor, name=tensor.name.removeprefix(f"{layer}."), files=()) for tensor in group]
        if run and (not layer or tensors != last or _family(layer) != _family(run[-1])):
            yield _run_name(run), last
            run = []
        if layer:
            run, last = [*run, layer], tensors
        else:
            yield "", tensors
    if run:
        yield _run_name(run), last


def _in_order(contents: Contents) -> list[TensorContents]:
    """Return the tensors by layer: as they are stored where the engine did it, else by name, numbers as numbers."""
    if contents.tp_size is not None:
        return list(contents.tensors)
    return sorted(contents.tensors, key=lambda tensor: [_as_number(word) for word in re.split(r"(\d+)", tensor.name)])


def _as_number(word: str) -> tuple[int, str]:
    return (int(word), "") if word.isdecimal() else (-1, word)


def _layer_of(tensor: TensorContents) -> str:
    match = LAYER.fullmatch(tensor.name)
    return match[1] if match else ""


def _family(layer: str) -> str:
    return layer.rpartition(".")[0]


def _run_name(run: list[str]) -> str:
    return run[0] if len(run) == 1 else f"{run[0]} … {run[-1].rpartition('.')[2]}"


def _tensor_row(tensor: TensorContents, tp_size: int | None, indent: int) -> _Row:
    cells = (tensor.name, tensor.dtype, _shape(tensor.shape))
    if tp_size is None:
        return _Row(cells, indent)
    cut = "not cut" if tensor.dim is None else f"dim {tensor.dim}"
    return _Row((*cells, cut, _shape(tensor.local_shape or ())), indent, tuple(_remarks(tensor, tp_size)))


def _remarks(tensor: TensorContents, tp_size: int) -> Iterator[str]:
    """Tell what of a tensor is fused, padded, or held by several ranks."""
    parts = [_part(part, tp_size) for part in tensor.parts]
    if len(parts) > 1 or any("," in part for part in parts):
        yield "; ".join(parts)
    if tensor.layout not in (None, "row_major"):
        yield f"layout {tensor.layout}"


def _part(part: ShardPart, tp_size: int) -> str:
    words = [f"{part.source} {part.global_size}".strip()]
    if part.padded_size != part.global_size:
        words.append(f"padded to {part.padded_size}")
    if part.num_shards < tp_size:
        words.append(f"each run of {part.local_size} on {_counted(tp_size // part.num_shards, 'rank')}")
    return ", ".join(words)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "one number"


# --- text ------------------------------------------------------------------------------------------------------------


def _lines(rows: list[_Row], width: int | None) -> Iterator[str]:
    """Lay rows out in columns; where these do not fit side by side, what has a name goes into the line below it."""
    count = max(len(row.cells) for row in rows)
    full = [row for row in rows if len(row.cells) == count]
    widths = [max(len(row.cells[column]) for row in full) for column in range(1, count)]
    names = max(len(row.cells[0]) + len(GAP) * row.indent for row in full)
    fits = width is None or names + sum(widths) + len(GAP) * len(widths) <= width
    for row in rows:
        indent = GAP * row.indent
        name = indent + row.cells[0]
        cells = GAP.join(cell.ljust(size) for cell, size in zip(row.cells[1:], widths, strict=False))
        beside = [f"{name.ljust(names)}{GAP}{cells}"] if fits else [name, *([f"{indent}{GAP}{cells}"] * bool(cells))]
        for line in beside:
            yield _cut(line.rstrip(), width)
        for remark in row.remarks:
            yield from _wrapped(f"{indent}{GAP}{remark}", width, indent + GAP)


def _cut(line: str, width: int | None) -> str:
    return line if width is None or len(line) <= width else f"{line[: width - 1]}…"


def _wrapped(text: str, width: int | None, indent: str) -> list[str]:
    return textwrap.wrap(
        text, max(len(indent) + 20, width or len(text)), subsequent_indent=indent, drop_whitespace=True
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
