"""Linear layers whose matrix is cut over the ranks."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from engine.communication.handler import CommunicationHandler
from engine.parallel.base import ShardPart, ShardSpec, TensorParallelLayer
from engine.parallel.collectives import (
    copy_to_group,
    reduce_from_group,
    reduce_scatter_to_group,
    sum_replica_gradients,
)


class ColumnParallelLinear(TensorParallelLayer):
    """Y = X A + b with the columns of A cut: A = [A_1 ... A_p], b = [b_1 ... b_p], and rank i returns X A_i + b_i.

    Several matrices that share X may be fused: A = [Q K V] gives rank i the columns [Q_i K_i V_i]. In torch's layout
    (`weight` is A transposed) columns are dimension 0.

    Args:
        in_features: rows of A.
        parts: one fused matrix each, cut over its columns.
        group: the ranks.
        bias: whether there is a b.
        device: where the parameters lie.
        dtype: their type.
    """

    def __init__(
        self,
        in_features: int,
        parts: Sequence[ShardPart],
        group: CommunicationHandler,
        *,
        bias: bool = False,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(group)
        spec = ShardSpec(0, tuple(parts))
        self.spec = spec
        self.weight = self.create_parameter("weight", (spec.local_size, in_features), spec, device=device, dtype=dtype)
        self.weight_scale: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = self.create_parameter("bias", (spec.local_size,), spec, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[num_tokens, in_features]`, the same on all ranks, to this rank's `[num_tokens, local_out_features]`."""
        weight = sum_replica_gradients(self.weight, self.spec, self.group)
        bias = None if self.bias is None else sum_replica_gradients(self.bias, self.spec, self.group)
        return self.kernels.linear(copy_to_group(x, self.group), weight, bias, self.weight_scale)


class RowParallelLinear(TensorParallelLayer):
    """Y = X A + b with the rows of A cut: X = [X_1 ... X_p], A = [A_1; ...; A_p], and Y = sum_i X_i A_i + b.

    Rank i has X_i, the output of a column-parallel layer. b is whole on every rank and added once, after the sum. In
    torch's layout (`weight` is A transposed) rows are dimension 1.

    Args:
        part: how the rows of A are cut.
        out_features: columns of A.
        group: the ranks.
        bias: whether there is a b.
        reduce: `all_reduce` returns all of Y on every rank, `reduce_scatter` the rank's own of p equal runs of tokens.
        device: where the parameters lie.
        dtype: their type.
    """

    def __init__(
        self,
        part: ShardPart,
        out_features: int,
        group: CommunicationHandler,
        *,
        bias: bool = False,
        reduce: Literal["all_reduce", "reduce_scatter"] = "all_reduce",
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(group)
        self.reduce = reduce
        shape = (out_features, part.local_size)
        self.weight = self.create_parameter("weight", shape, ShardSpec(1, (part,)), device=device, dtype=dtype)
        self.weight_scale: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = self.create_parameter("bias", (out_features,), ShardSpec(), device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map this rank's `[num_tokens, local_in_features]` to `[num_tokens, out_features]`.

        With `reduce="reduce_scatter"` the result is `[num_tokens / world_size, out_features]`.

        Raises:
            ValueError: when the tokens of a reduce-scatter are no multiple of the ranks.
        """
        if self.group.world_size == 1:
            return self.kernels.linear(x, self.weight, self.bias, self.weight_scale)
        partial = self.kernels.linear(x, self.weight, None, self.weight_scale)
        if self.reduce == "all_reduce":
            y = reduce_from_group(partial, self.group)
            return y if self.bias is None else y + self.bias
        y = reduce_scatter_to_group(partial, self.group)
        # Each rank adds b to its own tokens only, so b's gradients add up.
        return y if self.bias is None else y + copy_to_group(self.bias, self.group)
