"""What of which checkpoint tensor belongs where in a rank's model, as the layers' `ShardSpec`s say.

There is no table of names. A *target* is one tensor of the rank's model. It consists of *pieces*, one for each tensor
that the checkpoint knows by a name of its own: q, k and v of a fused qkv_proj. A rank's piece is a *slice* of that
tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from engine.kernels.base import Kernels
from engine.parallel.base import ShardPart, ShardSpec, TensorParallelLayer


@dataclass(frozen=True)
class TensorSlice:
    """`[start, stop)` along `dim` of a tensor of `global_shape`; all of it where `dim` is None."""

    global_shape: tuple[int, ...]
    dim: int | None = None
    start: int = 0
    stop: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in it, as on ranks that hold padding only."""
        return self.dim is not None and self.start == self.stop

    @property
    def shape(self) -> tuple[int, ...]:
        """Its own shape."""
        return tuple(self.stop - self.start if i == self.dim else size for i, size in enumerate(self.global_shape))

    def of(self, tensor: Tensor) -> Tensor:
        """Return this slice of a tensor of `global_shape`, as a view."""
        return tensor if self.dim is None else tensor.narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True)
class Piece:
    """A run of a target, the padding behind it, and what of which checkpoint tensor belongs there."""

    run: Tensor
    padding: Tensor
    sources: list[str]  # the checkpoint tensor's names: one, but for tied tensors
    wanted: TensorSlice


@dataclass(frozen=True)
class Target:
    """One tensor of the model, and the names that it goes by: tied parameters have several."""

    tensor: Tensor
    spec: ShardSpec
    names: list[str]
    quantizer: Kernels | None = None  # rounds to int8: of int8 matrices, and of the scales of their rows

    @property
    def is_scale(self) -> bool:
        """Whether it holds the scales of an int8 matrix."""
        return self.quantizer is not None and self.tensor.is_floating_point()

    @property
    def name(self) -> str:
        """The name that it is stored under."""
        return self.names[0]

    @property
    def global_shape(self) -> tuple[int, ...]:
        """The shape of all ranks' together, without padding."""
        shape, dim = tuple(self.tensor.shape), self.spec.dim
        if dim is None:
            return shape
        return (*shape[:dim], sum(part.global_size for part in self.spec.parts), *shape[dim + 1 :])

    def all_sources(self) -> Iterator[str]:
        """Yield every name that any part goes by in a checkpoint."""
        for part in self.spec.parts or (None,):
            yield from self._sources(part)

    def pieces(self, tp_rank: int, tp_size: int) -> Iterator[Piece]:
        """Yield what a rank holds of each part."""
        values, dim = self.tensor.data, self.spec.dim
        if dim is None:
            yield Piece(values, values.new_empty(0), self._sources(None), TensorSlice(tuple(values.shape)))
            return
        for part, offset in self.spec.places():
            start, stop = part.bounds(tp_rank, tp_size)
            used = stop - start
            run = values.narrow(dim, offset, part.local_size)
            global_shape = (*values.shape[:dim], part.global_size, *values.shape[dim + 1 :])
            yield Piece(
                run.narrow(dim, 0, used),
                run.narrow(dim, used, part.local_size - used),
                self._sources(part),
                TensorSlice(global_shape, dim, start, stop),
            )

    def _sources(self, part: ShardPart | None) -> list[str]:
        return [source_name(name, part) for name in self.names]


def targets_of(model: nn.Module) -> list[Target]:
    """Return the tensors of a model that a checkpoint holds: parameters, and buffers that are saved.

    A layer that is no `TensorParallelLayer` has them whole on every rank, and so has each of its buffers.

    Raises:
        ValueError: naming a parameter of a `TensorParallelLayer` without a `ShardSpec`, which nobody could cut, or
            state that is no tensor, which modules may have too.
    """
    names_of: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"tensor {name} is state of another kind, which checkpoints cannot hold")
        names_of.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    return [
        Target(tensors[key], _spec_of(model, names[0]), names, _quantizer_of(model, names[0]))
        for key, names in names_of.items()
    ]


def source_name(name: str, part: ShardPart | None) -> str:
    """Return the checkpoint's name of one part of a parameter: the last module's name gives way to the source."""
    if part is None or not part.source:
        return name
    *modules, _, own_name = name.split(".")
    return ".".join((*modules, part.source, own_name))


def name_of_matrix(scale_name: str) -> str:
    """Return the name of the matrix whose scales have a name."""
    return scale_name.removesuffix("_scale")


def _quantizer_of(model: nn.Module, name: str) -> Kernels | None:
    module_name, _, own_name = name.rpartition(".")
    layer = model.get_submodule(module_name)
    if not isinstance(layer, TensorParallelLayer) or "weight_scale" not in layer.shard_specs:
        return None
    return layer.kernels if own_name in ("weight", "weight_scale") else None


def _spec_of(model: nn.Module, name: str) -> ShardSpec:
    module_name, _, own_name = name.rpartition(".")
    layer = model.get_submodule(module_name)
    if isinstance(layer, TensorParallelLayer):
        if own_name in layer.shard_specs:
            return layer.shard_specs[own_name]
        if own_name in layer._parameters:
            raise ValueError(f"parameter {name} declares no ShardSpec")
    return ShardSpec()
