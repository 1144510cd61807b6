"""What every tensor-parallel layer declares: how its parameters are cut over the ranks."""

from dataclasses import dataclass

from torch import nn


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

    def bounds(self, tp_rank: int, tp_size: int) -> tuple[int, int]:
        """Return [start, stop) of the rank's run in the global tensor, clipped to `global_size` (may be empty)."""
        start = tp_rank * self.num_shards // tp_size * self.local_size
        return min(start, self.global_size), min(start + self.local_size, self.global_size)


@dataclass(frozen=True)
class ShardSpec:
    """How one parameter is cut: along `dim`, as consecutive parts; `dim=None`: every rank holds it whole."""

    dim: int | None = None
    parts: tuple[ShardPart, ...] = ()


class TensorParallelLayer(nn.Module):
    """Base of the parallel layers. `shard_specs` has one entry for each of the layer's own parameters, by its name."""

    shard_specs: dict[str, ShardSpec]

    def __init__(self) -> None:
        super().__init__()
        self.shard_specs = {}


def padded_to(size: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple
