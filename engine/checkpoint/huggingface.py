"""Fills a tensor-parallel model from a Hugging Face directory: each rank reads just the slices that it holds.

What to read follows from each parameter's `ShardSpec`; there is no table of names. What a directory must be like:

* It holds `model.safetensors`, or `model.safetensors.index.json` and the files that it names. As in transformers the
  single file wins where both are there. Pickled checkpoints are never opened.
* Every tensor of the model is there, in the model's global shape, as float32, bfloat16 or float16.
* Nothing else is there. A tensor that the model has no place for (a bias, an adapter, a scale, one layer more) was
  trained to be part of the result, so that leaving it out would serve another model than the one in the directory; it
  is an error. Only `rotary_emb.inv_freq` is passed over: old exports carry it, and it follows from config.json.
* Parameters that are one tensor by config.json (tied embeddings) may be there under each of their names, if the values
  are the same.
* Names may lack the `model.` in front, as those of a model saved without its head do.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.parallel.base import ShardPart, ShardSpec, iterate_sharded_parameters

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
READABLE_DTYPES = ("F32", "BF16", "F16")  # as safetensors spells them
DERIVED_TENSORS = ("rotary_emb.inv_freq",)
BASE_MODEL_PREFIX = "model."


def load_weights(model: nn.Module, directory: Path, tp_rank: int, tp_size: int) -> None:
    """Fill every parameter of `model` in place, converted to its dtype, and its padding with zeros.

    Args:
        model: made of layers that declare a `ShardSpec` for each parameter; on any device.
        directory: a Hugging Face model directory.
        tp_rank: the rank whose slices are read.
        tp_size: how many ranks the model is split over.

    Raises:
        ValueError: naming the file and the tensor, when the directory does not hold exactly this model.
    """
    targets = _targets(model)
    with WeightFiles(directory) as files:
        for problem in files.extras({source for target in targets for source in target.all_sources()}):
            raise ValueError(problem)
        for target in targets:
            _fill(target, files, tp_rank, tp_size)


def header_problems(model: nn.Module, directory: Path) -> Iterator[str]:
    """Yield each reason why `load_weights` would refuse `directory`, as the files' headers show them.

    Args:
        model: whole, as one rank holds it; on any device, `meta` included. Its parameters are left alone.
        directory: a Hugging Face model directory.

    Raises:
        ValueError: naming the file, when one cannot be opened at all.
    """
    targets = _targets(model)
    with WeightFiles(directory) as files:
        yield from files.extras({source for target in targets for source in target.all_sources()})
        for piece in (piece for target in targets for piece in _pieces(target, 0, 1)):
            for source in files.present(piece.sources):
                if problem := files.problem_of(source, piece.wanted.global_shape):
                    yield problem


def value_problems(model: nn.Module, directory: Path) -> Iterator[str]:
    """Yield each reason why `load_weights` would refuse the numbers in `directory`, whose headers are as they should.

    Only tensors whose numbers can be wrong are read, one at a time: those that float16 may not hold, and those that
    config.json ties into one.

    Args:
        model: see `header_problems`; of the dtype that the weights would be loaded in.
        directory: a Hugging Face model directory.
    """
    with WeightFiles(directory) as files:
        for piece in (piece for target in _targets(model) for piece in _pieces(target, 0, 1)):
            sources = files.present(piece.sources)
            if len(sources) == 1 and not (piece.run.dtype == torch.float16 and files.dtype_of(sources[0]) != "F16"):
                continue
            try:
                _copy(torch.empty_like(piece.run, device="cpu"), sources, files, piece.wanted)
            except ValueError as error:
                yield str(error)


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a model directory, sorted by name.

    Raises:
        ValueError: naming the file, when there are none, or the index cannot be read or names one that is not there.
    """
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    return sorted({directory / name for name in _read_index(directory).values()})


def _read_index(directory: Path) -> dict[str, str]:
    """Return the file name of each tensor."""
    path = directory / INDEX_FILE
    if not path.is_file():
        raise ValueError(f"{directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}; no other weights are read")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: has no weight_map with the file of each tensor")
    for tensor, name in weight_map.items():
        _check_indexed_file(directory, path, tensor, name)
    return weight_map


def _check_indexed_file(directory: Path, index: Path, tensor: str, name: Any) -> None:
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"{index}: {tensor} must name a file of the same directory, not {name!r}")
    if not (directory / name).is_file():
        raise ValueError(f"{index}: {tensor} is in {name}, but {directory} has no such file")


class WeightFiles:
    """The open safetensors files of one directory, as one set of tensors. Use it as a context manager."""

    def __init__(self, directory: Path) -> None:
        self._stack = ExitStack()
        self._paths = weight_files(directory)
        self._index = None if self._paths == [directory / SINGLE_FILE] else _read_index(directory)
        self._listing = directory / (SINGLE_FILE if self._index is None else INDEX_FILE)  # what says which tensors are
        self._handles: dict[Path, Any] = {}
        self._path_of: dict[str, Path] = {}
        self._prefix = ""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for path in self._paths:
                self._handles[path] = stack.enter_context(_open(path))
            self._stack = stack.pop_all()
        self._locate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _locate(self) -> None:
        """Find the file of each tensor: in the index where there is one, else in the files."""
        for path, handle in self._handles.items():
            self._path_of.update(dict.fromkeys(handle.keys(), path))
        for name, file_name in (self._index or {}).items():
            path = self._listing.parent / file_name
            if name not in self._handles[path].keys():  # noqa: SIM118  # a safetensors file is no mapping
                raise ValueError(f"{path}: has no tensor {name}, which {self._listing.name} says it has")
            self._path_of[name] = path
        if not any(name.startswith(BASE_MODEL_PREFIX) for name in self._path_of):
            self._prefix = BASE_MODEL_PREFIX

    def extras(self, names: set[str]) -> Iterator[str]:
        """Yield one line if there are tensors that are none of `names`, nor derived from the configuration."""
        expected = {name.removeprefix(self._prefix) for name in names}
        extras = sorted(name for name in self._path_of if name not in expected and not name.endswith(DERIVED_TENSORS))
        if extras:
            more = f", nor has it for {len(extras) - 1} more" if len(extras) > 1 else ""
            yield (
                f"{self._path_of[extras[0]]}: the model that config.json describes has no place for "
                f"tensor {extras[0]}{more}"
            )

    def __contains__(self, name: str) -> bool:
        return name.removeprefix(self._prefix) in self._path_of

    def present(self, names: list[str]) -> list[str]:
        """Return those of one tensor's `names` that the files have; where they have none, the first."""
        return [name for name in names if name in self] or names[:1]

    def dtype_of(self, name: str) -> str:
        """Return the type of a tensor that is there, as safetensors spells it."""
        return str(self._slice(name.removeprefix(self._prefix)).get_dtype())

    def path_of(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._path_of[name.removeprefix(self._prefix)]

    def read(self, name: str, wanted: "_Slice") -> Tensor:
        """Return a slice of the tensor that the model calls `name`; other parts of it are not read.

        Raises:
            ValueError: if the tensor is missing, or not of the expected shape, or of a type that is not read.
        """
        problem = self.problem_of(name, wanted.global_shape)
        if problem:
            raise ValueError(problem)
        tensor = self._slice(name.removeprefix(self._prefix))
        values: Tensor = torch.empty(wanted.local_shape) if wanted.is_empty else tensor[wanted.index]
        return values

    def problem_of(self, name: str, global_shape: list[int]) -> str:
        """Return why a tensor cannot be read as one of `global_shape`; nothing if it can."""
        name = name.removeprefix(self._prefix)
        if name not in self._path_of:
            return f"{self._listing}: tensor {name} is missing"
        tensor = self._slice(name)
        problem = _problem_of(tensor.get_dtype(), tensor.get_shape(), global_shape)
        return f"{self._path_of[name]}: tensor {name} {problem}" if problem else ""

    def _slice(self, name: str) -> Any:
        return self._handles[self._path_of[name]].get_slice(name)


@dataclass(frozen=True)
class _Slice:
    """`[start, stop)` along `dim` of a tensor of `global_shape`; all of it where `dim` is None."""

    global_shape: list[int]
    dim: int | None = None
    start: int = 0
    stop: int = 0

    @property
    def is_empty(self) -> bool:
        return self.dim is not None and self.start == self.stop

    @property
    def local_shape(self) -> list[int]:
        return [self.stop - self.start if i == self.dim else size for i, size in enumerate(self.global_shape)]

    @property
    def index(self) -> Any:
        return ... if self.dim is None else (*[slice(None)] * self.dim, slice(self.start, self.stop))


def _problem_of(dtype: str, shape: list[int], expected_shape: list[int]) -> str:
    if dtype not in READABLE_DTYPES:
        return f"is of type {dtype}; read are {', '.join(READABLE_DTYPES)}"
    return "" if shape == expected_shape else f"has shape {shape}, but config.json asks for {expected_shape}"


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is no whole safetensors file ({error}); was it downloaded completely?") from error


@dataclass(frozen=True)
class _Target:
    """One parameter to fill, and the names that it goes by: tied parameters have several."""

    parameter: nn.Parameter
    spec: ShardSpec
    names: list[str]

    def sources(self, part: ShardPart | None) -> list[str]:
        """Return the checkpoint's names of one part, or of all of the parameter."""
        return [_source_name(name, part) for name in self.names]

    def all_sources(self) -> Iterator[str]:
        """Yield every name that any part goes by."""
        for part in self.spec.parts or (None,):
            yield from self.sources(part)


def _targets(model: nn.Module) -> list[_Target]:
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    return [
        _Target(parameter, spec, names_of[id(parameter)]) for _, parameter, spec in iterate_sharded_parameters(model)
    ]


def _source_name(name: str, part: ShardPart | None) -> str:
    """Return the checkpoint's name of one part of a parameter: the last module's name gives way to the source."""
    if part is None or not part.source:
        return name
    *modules, _, own_name = name.split(".")
    return ".".join((*modules, part.source, own_name))


@dataclass(frozen=True)
class _Piece:
    """A run of a parameter, the padding behind it, and what of which checkpoint tensor belongs there."""

    run: Tensor
    padding: Tensor
    sources: list[str]
    wanted: _Slice


def _fill(target: _Target, files: WeightFiles, tp_rank: int, tp_size: int) -> None:
    for piece in _pieces(target, tp_rank, tp_size):
        _copy(piece.run, piece.sources, files, piece.wanted)
        piece.padding.zero_()


def _pieces(target: _Target, tp_rank: int, tp_size: int) -> Iterator[_Piece]:
    values, dim = target.parameter.data, target.spec.dim
    if dim is None:
        yield _Piece(values, values.new_empty(0), target.sources(None), _Slice(list(values.shape)))
        return
    for part, offset in target.spec.places():
        start, stop = part.bounds(tp_rank, tp_size)
        used = stop - start
        run = values.narrow(dim, offset, part.local_size)
        global_shape = [*values.shape[:dim], part.global_size, *values.shape[dim + 1 :]]
        yield _Piece(
            run.narrow(dim, 0, used),
            run.narrow(dim, used, part.local_size - used),
            target.sources(part),
            _Slice(global_shape, dim, start, stop),
        )


def _copy(run: Tensor, sources: list[str], files: WeightFiles, wanted: _Slice) -> None:
    """Copy the first of `sources` that the files have; where they have others too, these must be the same."""
    first, *others = files.present(sources)
    values = files.read(first, wanted)
    run.copy_(values)
    if run.dtype == torch.float16 and values.dtype != torch.float16 and not bool(run.isfinite().all()):
        raise ValueError(
            f"{files.path_of(first)}: tensor {first} has values that float16 cannot hold; use another --dtype"
        )
    for other in others:
        if not torch.equal(values, files.read(other, wanted)):
            raise ValueError(
                f"{files.path_of(other)}: tensor {other} differs from {first}, although config.json ties them into one"
            )
