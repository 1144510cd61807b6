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
from pathlib import Path
from types import TracebackType
from typing import Any

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
    with WeightFiles(directory) as files, torch.no_grad():
        names = _names_of_parameters(model)
        files.check_no_extras({source for spec, aliases in names.values() for source in _all_sources(spec, aliases)})
        for name, parameter, spec in iterate_sharded_parameters(model):
            _Filler(files, spec, tp_rank, tp_size).fill(parameter, names[name][1])


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

    def __enter__(self) -> "WeightFiles":
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

    def check_no_extras(self, names: set[str]) -> None:
        """Raise ValueError if there is a tensor that is none of `names`, nor derived from the configuration."""
        expected = {name.removeprefix(self._prefix) for name in names}
        extras = sorted(name for name in self._path_of if name not in expected and not name.endswith(DERIVED_TENSORS))
        if extras:
            more = f", nor has it for {len(extras) - 1} more" if len(extras) > 1 else ""
            raise ValueError(
                f"{self._path_of[extras[0]]}: the model that config.json describes has no place for "
                f"tensor {extras[0]}{more}"
            )

    def __contains__(self, name: str) -> bool:
        return name.removeprefix(self._prefix) in self._path_of

    def read(self, name: str, shape: list[int], dim: int | None, start: int, stop: int) -> Tensor:
        """Return `[start, stop)` of a tensor along `dim`, or all of it if `dim` is None.

        Args:
            name: as the model has it.
            shape: that the whole tensor must have.
            dim: the dimension to cut.
            start: where the slice begins.
            stop: where it ends; equal to `start` for an empty slice.

        Raises:
            ValueError: if the tensor is missing, or not of this shape, or of a type that is not read.
        """
        name = name.removeprefix(self._prefix)
        if name not in self._path_of:
            raise ValueError(f"{self._listing}: tensor {name} is missing")
        path = self._path_of[name]
        content = self._handles[path].get_slice(name)
        if content.get_dtype() not in READABLE_DTYPES:
            raise ValueError(
                f"{path}: tensor {name} is of type {content.get_dtype()}; read are {', '.join(READABLE_DTYPES)}"
            )
        if content.get_shape() != shape:
            raise ValueError(f"{path}: tensor {name} has shape {content.get_shape()}, but config.json asks for {shape}")
        if dim is None:
            return self._slice(content, ...)
        if start == stop:
            return torch.empty([*shape[:dim], 0, *shape[dim + 1 :]])
        return self._slice(content, (*[slice(None)] * dim, slice(start, stop)))

    def path_of(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._path_of[name.removeprefix(self._prefix)]

    @staticmethod
    def _slice(content: Any, index: Any) -> Tensor:
        values: Tensor = content[index]
        return values


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is no whole safetensors file ({error}); was it downloaded completely?") from error


def _names_of_parameters(model: nn.Module) -> dict[str, tuple[ShardSpec, list[str]]]:
    """Return each parameter's spec and all names it goes by (tied ones have several), by its first name."""
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    return {name: (spec, names_of[id(parameter)]) for name, parameter, spec in iterate_sharded_parameters(model)}


def _all_sources(spec: ShardSpec, aliases: list[str]) -> Iterator[str]:
    parts: tuple[ShardPart | None, ...] = spec.parts or (None,)
    return (_source_name(alias, part) for alias in aliases for part in parts)


def _source_name(name: str, part: ShardPart | None) -> str:
    """Return the checkpoint's name of one part of a parameter: the last module's name gives way to the source."""
    if part is None or not part.source:
        return name
    *modules, _, own_name = name.split(".")
    return ".".join((*modules, part.source, own_name))


class _Filler:
    """Fills one parameter, part by part."""

    def __init__(self, files: WeightFiles, spec: ShardSpec, tp_rank: int, tp_size: int) -> None:
        self._files = files
        self._spec = spec
        self._tp_rank = tp_rank
        self._tp_size = tp_size

    def fill(self, parameter: nn.Parameter, aliases: list[str]) -> None:
        dim = self._spec.dim
        if dim is None:
            self._copy(parameter.data, aliases, None, list(parameter.shape), (0, 0))
            return
        for part, offset in self._spec.places():
            start, stop = part.bounds(self._tp_rank, self._tp_size)
            run = parameter.data.narrow(dim, offset, part.local_size)
            shape = [*parameter.shape[:dim], part.global_size, *parameter.shape[dim + 1 :]]
            self._copy(run.narrow(dim, 0, stop - start), aliases, part, shape, (start, stop))
            run.narrow(dim, stop - start, part.local_size - (stop - start)).zero_()

    def _copy(
        self, target: Tensor, aliases: list[str], part: ShardPart | None, shape: list[int], bounds: tuple[int, int]
    ) -> None:
        sources = [_source_name(alias, part) for alias in aliases]
        first, *others = [source for source in sources if source in self._files] or sources[:1]
        values = self._files.read(first, shape, self._spec.dim, *bounds)
        target.copy_(values)
        self._check_converted(first, values, target)
        for other in others:
            if not torch.equal(values, self._files.read(other, shape, self._spec.dim, *bounds)):
                raise ValueError(
                    f"{self._files.path_of(other)}: tensor {other} differs from {first}, "
                    "although config.json ties them into one"
                )

    def _check_converted(self, name: str, values: Tensor, target: Tensor) -> None:
        """Only float16 has a smaller range than the types that are read."""
        if target.dtype == torch.float16 and values.dtype != torch.float16 and not bool(target.isfinite().all()):
            raise ValueError(
                f"{self._files.path_of(name)}: tensor {name} has values that float16 cannot hold; use another --dtype"
            )
