"""A Hugging Face directory as a source of tensors.

What a directory must be like:

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.checkpoint.retry import read_bytes
from engine.checkpoint.source import TensorSource
from engine.checkpoint.targets import TensorSlice
from engine.checkpoint.tensor_file import TensorFile

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DERIVED_TENSORS = ("rotary_emb.inv_freq",)
BASE_MODEL_PREFIX = "model."


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
    content = read_bytes(path)
    try:
        index = json.loads(content)
    except (ValueError, RecursionError) as error:
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


class HuggingFaceFiles(TensorSource):
    """The open safetensors files of one directory, as one set of tensors.

    Args:
        directory: a Hugging Face model directory.
        use_memory_map: see `TensorFile`.
        check: see `TensorFile`.

    Raises:
        ValueError: naming the file that is missing, not whole, or not what the index says.
    """

    def __init__(
        self, directory: Path, *, use_memory_map: bool = True, check: Callable[[], None] = lambda: None
    ) -> None:
        self.paths = weight_files(directory)
        index = None if self.paths == [directory / SINGLE_FILE] else _read_index(directory)
        self._listing = directory / (SINGLE_FILE if index is None else INDEX_FILE)  # what says which tensors are
        self._files: dict[Path, TensorFile] = {}
        try:
            for path in self.paths:
                self._files[path] = TensorFile(path, use_memory_map=use_memory_map, check=check)
            self._file_of = self._locate(index or {})
        except BaseException:
            self.close()
            raise
        has_prefix = any(name.startswith(BASE_MODEL_PREFIX) for name in self._file_of)
        self._prefix = "" if has_prefix else BASE_MODEL_PREFIX

    def _locate(self, index: dict[str, str]) -> dict[str, TensorFile]:
        """Return the file of each tensor: as the index says where there is one, else by what is in the files."""
        file_of = {name: file for file in self._files.values() for name in file.names}
        for name, file_name in index.items():
            file = self._files[self._listing.parent / file_name]
            if name not in file.places:
                raise ValueError(f"{file.path}: has no tensor {name}, which {self._listing.name} says it has")
            file_of[name] = file
        return file_of

    def open_all(self) -> list[Path]:
        """See `TensorSource`."""
        return self.paths

    def close(self) -> None:
        """See `TensorSource`."""
        for file in self._files.values():
            file.close()

    def __contains__(self, name: str) -> bool:
        return self.stored_name(name) in self._file_of

    def extras(self, names: set[str]) -> Iterator[str]:
        """See `TensorSource`."""
        expected = {self.stored_name(name) for name in names}
        extras = sorted(name for name in self._file_of if name not in expected and not name.endswith(DERIVED_TENSORS))
        if extras:
            more = f", nor has it for {len(extras) - 1} more" if len(extras) > 1 else ""
            yield (
                f"{self._file_of[extras[0]].path}: the model that config.json describes has no place for "
                f"tensor {extras[0]}{more}"
            )

    def dtype_of(self, name: str) -> str:
        """See `TensorSource`."""
        return self._file_of[self.stored_name(name)].places[self.stored_name(name)].dtype

    def shape_of(self, name: str) -> tuple[int, ...]:
        """See `TensorSource`."""
        return self._file_of[self.stored_name(name)].places[self.stored_name(name)].shape

    def path_of(self, name: str) -> Path:
        """See `TensorSource`."""
        return self._file_of[self.stored_name(name)].path

    def missing(self, name: str) -> str:
        """See `TensorSource`."""
        return f"{self._listing}: tensor {self.stored_name(name)} is missing"

    def read_slice(self, name: str, wanted: TensorSlice) -> Tensor:
        """See `TensorSource`."""
        name = self.stored_name(name)
        return self._file_of[name].read(name, wanted)

    def stored_name(self, name: str) -> str:
        """See `TensorSource`."""
        return name.removeprefix(self._prefix)
