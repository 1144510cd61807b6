"""Where tensors come from: a checkpoint, whatever its form, as one set of named tensors that are read in slices."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from engine.checkpoint.targets import TensorSlice
from engine.checkpoint.tensor_header import DTYPE_NAMES

READABLE_DTYPES = ("F32", "BF16", "F16")  # as safetensors spells them; these turn into each other


class TensorSource(ABC):
    """The tensors of one checkpoint, by the names and in the shapes that Hugging Face gives them.

    Use it as a context manager: it keeps files open.
    """

    bytes_read: int = 0  # what `read` has handed out
    quantization: str = "none"  # of its matrices, as `--quantization` has it

    @abstractmethod
    def __contains__(self, name: str) -> bool: ...

    @abstractmethod
    def extras(self, names: set[str]) -> Iterator[str]:
        """Yield one line if there are tensors that are none of `names`, nor follow from the configuration."""

    @abstractmethod
    def dtype_of(self, name: str) -> str:
        """Return the type of a tensor that is there, as safetensors spells it."""

    @abstractmethod
    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that is there."""

    @abstractmethod
    def path_of(self, name: str) -> Path:
        """Return a file that holds a tensor that is there, or a part of it."""

    @abstractmethod
    def missing(self, name: str) -> str:
        """Return the error of a tensor that is not there."""

    @abstractmethod
    def read_slice(self, name: str, wanted: TensorSlice) -> Tensor:
        """Return a slice, not empty, of a tensor that is there and of the right shape. Nothing else is read."""

    @abstractmethod
    def open_all(self) -> list[Path]:
        """Open every file and return their paths.

        Raises:
            ValueError: naming the first that is missing, not whole, or not what it should be.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def stored_name(self, name: str) -> str:
        """Return the name that the files have for a tensor."""
        return name

    def present(self, names: list[str]) -> list[str]:
        """Return those of one tensor's `names` that are there; where none is, the first."""
        return [name for name in names if name in self] or names[:1]

    def problem_of(self, name: str, global_shape: tuple[int, ...], dtype: torch.dtype) -> str:
        """Return why a tensor cannot be read as one of `global_shape` and turned into `dtype`; nothing if it can."""
        if name not in self:
            return self.missing(name)
        stored, shape = self.dtype_of(name), self.shape_of(name)
        where = f"{self.path_of(name)}: tensor {self.stored_name(name)}"
        if stored != DTYPE_NAMES[dtype] and not (stored in READABLE_DTYPES and dtype.is_floating_point):
            return f"{where} is of type {stored}; read are {', '.join(READABLE_DTYPES)}"
        if shape != global_shape:
            return f"{where} has shape {list(shape)}, but config.json asks for {list(global_shape)}"
        return ""

    def read(self, name: str, wanted: TensorSlice, dtype: torch.dtype) -> Tensor:
        """Return a slice of a tensor, in the type that it is stored in; other parts of it are not read.

        Args:
            name: of the tensor.
            wanted: the slice.
            dtype: what it will be turned into.

        Raises:
            ValueError: if the tensor is missing, or not of the expected shape, or of a type that is not read.
        """
        problem = self.problem_of(name, wanted.global_shape, dtype)
        if problem:
            raise ValueError(problem)
        if wanted.is_empty:
            return torch.empty(wanted.shape, dtype=dtype)
        values = self.read_slice(name, wanted)
        self.bytes_read += values.nbytes
        return values
