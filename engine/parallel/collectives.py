"""Collectives that gradients flow through: each one's backward is the transpose of its forward.

| forward | backward |
|---|---|
| `copy_to_group`: identity | all-reduce |
| `reduce_from_group`: all-reduce | identity |
| `gather_from_group`: all-gather, last dimension | split |
| `scatter_to_group`: split, last dimension | all-gather |
| `reduce_scatter_to_group`: reduce-scatter, first dimension | all-gather |
| `sum_replica_gradients`: identity | sum over the ranks that hold the same run |

See Megatron-LM (Shoeybi et al., 2019, arXiv 1909.08053, section 3; Korthikanti et al., 2022, arXiv 2205.05198). Where
gradients are off the group's collective is called without any detour; for one rank nothing is called.
"""

from typing import Any

import torch
from torch import Tensor

from engine.communication.handler import CommunicationHandler
from engine.parallel.base import ShardSpec


def copy_to_group(tensor: Tensor, group: CommunicationHandler) -> Tensor:
    """Return `tensor`, which all ranks hold; each uses it for its own part, so its gradients add up."""
    if group.world_size == 1 or not torch.is_grad_enabled():
        return tensor
    return _apply(_Copy, tensor, group)


def reduce_from_group(tensor: Tensor, group: CommunicationHandler) -> Tensor:
    """Return the ranks' sum of `tensor`. Where gradients are off, `tensor` itself is overwritten."""
    if group.world_size == 1:
        return tensor
    if not torch.is_grad_enabled():
        return group.all_reduce(tensor.contiguous())
    return _apply(_Reduce, tensor, group)


def gather_from_group(tensor: Tensor, group: CommunicationHandler) -> Tensor:
    """Return the ranks' tensors `[..., n]`, concatenated to `[..., world_size * n]` on each rank."""
    if group.world_size == 1:
        return tensor
    if not torch.is_grad_enabled():
        return group.all_gather(tensor)
    return _apply(_Gather, tensor, group)


def scatter_to_group(tensor: Tensor, group: CommunicationHandler) -> Tensor:
    """Return this rank's part `[..., n / world_size]` of `tensor` `[..., n]`, which all ranks hold."""
    if group.world_size == 1:
        return tensor
    if not torch.is_grad_enabled():
        return group.split(tensor, -1)[group.rank]
    return _apply(_Scatter, tensor, group)


def reduce_scatter_to_group(tensor: Tensor, group: CommunicationHandler) -> Tensor:
    """Return this rank's rows `[n / world_size, ...]` of the ranks' sum of `tensor` `[n, ...]`."""
    if group.world_size == 1:
        return tensor
    if not torch.is_grad_enabled():
        return group.reduce_scatter(tensor)
    return _apply(_ReduceScatter, tensor, group)


def sum_replica_gradients(parameter: Tensor, spec: ShardSpec, group: CommunicationHandler) -> Tensor:
    """Return `parameter`; the gradient of a run that several ranks hold becomes the sum of theirs."""
    if not torch.is_grad_enabled() or not spec.has_replicas(group.world_size):
        return parameter
    summed: Tensor = _SumReplicaGradients.apply(parameter, spec, group)  # type: ignore[no-untyped-call]
    return summed


def _apply(function: type[torch.autograd.Function], tensor: Tensor, group: CommunicationHandler) -> Tensor:
    result: Tensor = function.apply(tensor, group)  # type: ignore[no-untyped-call]
    return result


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: CommunicationHandler) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_reduce(_own_copy(gradient)), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, tensor: Tensor, group: CommunicationHandler) -> Tensor:
        return group.all_reduce(_own_copy(tensor))

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: CommunicationHandler) -> Tensor:
        ctx.group = group
        return group.all_gather(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.group.split(gradient, -1)[ctx.group.rank].contiguous(), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: CommunicationHandler) -> Tensor:
        ctx.group = group
        return group.split(tensor, -1)[group.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_gather(gradient), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: CommunicationHandler) -> Tensor:
        ctx.group = group
        return group.reduce_scatter(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_gather(gradient, dim=0), None


class _SumReplicaGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, spec: ShardSpec, group: CommunicationHandler) -> Tensor:
        ctx.spec, ctx.group = spec, group
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        spec: ShardSpec = ctx.spec
        group: CommunicationHandler = ctx.group
        assert spec.dim is not None
        summed = _own_copy(gradient)
        for part, offset in spec.places():
            if part.num_shards < group.world_size:
                # Each replica group adds up in a slot of its own, so the whole group serves and no other is needed.
                run = summed.narrow(spec.dim, offset, part.local_size)
                slots = run.new_zeros((part.num_shards, *run.shape))
                slot = slots[part.shard_index(group.rank, group.world_size)]
                slot.copy_(run)
                group.all_reduce(slots)
                run.copy_(slot)
        return summed, None, None


def _own_copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
