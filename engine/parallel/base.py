"""What every tensor-parallel layer declares: how its parameters are cut over the ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from engine.communication.handler import CommunicationHandler
from engine.kernels.base import Kernels
from engine.kernels.torch_kernels import TORCH_KERNELS


@dataclass(frozen=True)
class ShardPart:
    """One global tensor's place in a parameter.

    The global tensor (`global_size` long in the split dimension, zero-padded to `padded_size`) is cut into `num_shards`
    equal runs. With fewer shards than ranks, neighbouring ranks hold the same run (replicated KV heads).
    """

    source: str  # the module's name in the checkpoint where it is not the parameter's own: q_proj in qkv_proj; else ""
    global_size: int
    padded_size: int
    num_shards: int

    @property
    def local_size(self) -> int:
        """Length of one rank's run."""
        return self.padded_size // self.num_shards

    def shard_index(self, tp_rank: int, tp_size: int) -> int:
        """Return which of the `num_shards` runs the rank holds."""
        return tp_rank * self.num_shards // tp_size

    def bounds(self, tp_rank: int, tp_size: int) -> tuple[int, int]:
        """Return [start, stop) of the rank's run in the global tensor, clipped to `global_size` (may be empty)."""
        start = self.shard_index(tp_rank, tp_size) * self.local_size
        return min(start, self.global_size), min(start + self.local_size, self.global_size)


@dataclass(frozen=True)
class ShardSpec:
    """How one parameter is cut: along `dim`, as consecutive parts; `dim=None`: every rank holds it whole."""

    dim: int | None = None
    parts: tuple[ShardPart, ...] = ()

    @property
    def local_size(self) -> int:
        """Length of the rank's parameter in the split dimension: its runs of all parts."""
        return sum(part.local_size for part in self.parts)

    def places(self) -> Iterator[tuple[ShardPart, int]]:
        """Yield each part with the offset of its run in the rank's parameter."""
        offset = 0
        for part in self.parts:
            yield part, offset
            offset += part.local_size

    def has_replicas(self, tp_size: int) -> bool:
        """Whether any run is held by more than one rank."""
        return any(part.num_shards < tp_size for part in self.parts)


class TensorParallelLayer(nn.Module):
    """Base of the parallel layers. `shard_specs` has one entry for each of the layer's own parameters, by its name.

    Layers with a matrix, `weight`, have a `weight_scale` beside it, None unless the matrix is int8; see
    `engine.parallel.quantization`.
    """

    shard_specs: dict[str, ShardSpec]
    kernels: Kernels = TORCH_KERNELS

    def __init__(self, group: CommunicationHandler) -> None:
        super().__init__()
        self.group = group
        self.shard_specs = {}

    def create_parameter(
        self, name: str, shape: tuple[int, ...], spec: ShardSpec, *, device: torch.device, dtype: torch.dtype
    ) -> nn.Parameter:
        """Return an uninitialised parameter of the rank's own `shape`, declared as `name`. Who fills it pads with 0."""
        self.shard_specs[name] = spec
        return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


def use_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Let all layers of `model` compute with `kernels`, rather than with torch."""
    for module in model.modules():
        if isinstance(module, TensorParallelLayer):
            module.kernels = kernels


def iterate_sharded_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, ShardSpec]]:
    """Yield (name, parameter, how it is cut) for every parameter of `model` once, in the order of its modules.

    A parameter's name is its tensor's name in the checkpoint, with the name of its module (the last but one in the
    path) replaced by the `source` of the part, where it has one. A tied LM head shares its embedding's parameter and
    is not yielded; so that it stays tied, fill parameters in place or through `.data`.

    Raises:
        ValueError: naming a parameter that no layer has declared a `ShardSpec` for.
    """
    for name, parameter in model.named_parameters():
        module_name, _, own_name = name.rpartition(".")
        layer = model.get_submodule(module_name)
        if not isinstance(layer, TensorParallelLayer) or own_name not in layer.shard_specs:
            raise ValueError(f"parameter {name} declares no ShardSpec")
        yield name, parameter, layer.shard_specs[own_name]


def padded_to(size: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def split_evenly(size: int, tp_size: int, source: str = "") -> ShardPart:
    """Return the part that cuts a dimension of `size`, padded to fit, into one run a rank."""
    return ShardPart(source, size, padded_to(size, tp_size), tp_size)
