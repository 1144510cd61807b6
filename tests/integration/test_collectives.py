"""Collectives among real ranks, and the gradients that flow through them."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.communication.handler import CommunicationHandler
from engine.communication.process_group import ProcessGroupManager
from engine.parallel import collectives
from engine.parallel.base import ShardPart, ShardSpec
from tests.distributed import RankFailedError, run_on_ranks
from tests.ports import free_port

SIZES = [2, 3, 4]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64]


def rank_tensor(rank: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Small whole numbers: their sums are exact in every type."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-20, 20, shape, generator=generator).to(dtype)


def all_tensors(group: CommunicationHandler, *shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [rank_tensor(rank, *shape, dtype=dtype) for rank in range(group.world_size)]


def equal(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def check_all_reduce(group: CommunicationHandler, dtype: torch.dtype) -> None:
    tensor = rank_tensor(group.rank, 3, 5, dtype=dtype)
    assert group.all_reduce(tensor) is tensor
    equal(tensor, torch.stack(all_tensors(group, 3, 5, dtype=dtype)).sum(0).to(dtype))


def check_reduce_scatter(group: CommunicationHandler, dtype: torch.dtype, dim: int) -> None:
    shape = (2 * group.world_size, 3 * group.world_size)
    ours = group.reduce_scatter(rank_tensor(group.rank, *shape, dtype=dtype), dim)
    whole = torch.stack(all_tensors(group, *shape, dtype=dtype)).sum(0).to(dtype)
    equal(ours, whole.chunk(group.world_size, dim)[group.rank])


def check_all_gather(group: CommunicationHandler, dtype: torch.dtype, dim: int) -> None:
    ours = rank_tensor(group.rank, 5, 3, dtype=dtype).t()  # not contiguous
    expected = torch.cat([tensor.t() for tensor in all_tensors(group, 5, 3, dtype=dtype)], dim)
    equal(group.all_gather(ours, dim), expected)


def check_gather(group: CommunicationHandler, dtype: torch.dtype, dim: int) -> None:
    gathered = group.gather(rank_tensor(group.rank, 3, 5, dtype=dtype), dim)
    if group.rank:
        assert gathered is None
    else:
        assert gathered is not None
        equal(gathered, torch.cat(all_tensors(group, 3, 5, dtype=dtype), dim))


def check_broadcast(group: CommunicationHandler, dtype: torch.dtype, source: int) -> None:
    tensor = rank_tensor(group.rank, 3, 5, dtype=dtype)
    assert group.broadcast(tensor, source) is tensor
    equal(tensor, rank_tensor(source, 3, 5, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tp_size", SIZES)
def test_all_reduce_sums_in_place(tp_size: int, dtype: torch.dtype) -> None:
    run_on_ranks(check_all_reduce, tp_size, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize("dim", [0, 1])
def test_reduce_scatter_returns_the_ranks_own_run_of_the_sum(tp_size: int, dtype: torch.dtype, dim: int) -> None:
    run_on_ranks(check_reduce_scatter, tp_size, dtype, dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, -1])
def test_all_gather_concatenates_in_rank_order(dtype: torch.dtype, dim: int) -> None:
    run_on_ranks(check_all_gather, 3, dtype, dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, -1])
def test_gather_concatenates_on_rank_0_alone(dtype: torch.dtype, dim: int) -> None:
    run_on_ranks(check_gather, 3, dtype, dim)


@pytest.mark.parametrize("source", [0, 2])
def test_broadcast_overwrites_with_the_sources_tensor(source: int) -> None:
    run_on_ranks(check_broadcast, 3, torch.bfloat16, source)


def reduce_scatter_unevenly(group: CommunicationHandler) -> None:
    group.reduce_scatter(torch.ones(group.world_size + 1))


def test_a_dimension_that_does_not_split_evenly_is_refused() -> None:
    with pytest.raises(RankFailedError, match="of size 3 cannot be split evenly over 2 ranks"):
        run_on_ranks(reduce_scatter_unevenly, 2)


def test_one_rank_alone_forms_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with ProcessGroupManager(torch.device("cpu")) as groups:
        group = groups.tensor_parallel
        assert (group.rank, group.world_size) == (0, 1)
        assert not torch.distributed.is_initialized()
        tensor = torch.ones(2, 3)
        for result in (
            group.all_reduce(tensor),
            group.all_gather(tensor),
            group.gather(tensor),
            group.broadcast(tensor),
            group.reduce_scatter(tensor),
        ):
            assert result is tensor
        group.barrier()
        assert group.take_times() == ({}, {}, {})


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, not 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
    ],
)
def test_wrong_variables_are_named(variables: dict[str, str], complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=complaint):
        ProcessGroupManager(torch.device("cpu"))


def check_times(group: CommunicationHandler) -> None:
    for _ in range(3):
        group.all_reduce(torch.ones(4))
    group.gather(torch.ones(4))
    group.barrier()
    times = group.take_times()
    assert {name: sum(delta.counts) for name, delta in times.whole.items()} == {
        "all_reduce": 3,
        "gather": 1,
        "barrier": 1,
    }
    assert all(delta.sum > 0 for delta in times.whole.values())
    assert times.num_bytes == {"all_reduce": 3 * 16, "gather": 16 * group.world_size, "barrier": 0}
    assert group.take_times() == ({}, {}, {})


def test_each_collective_is_timed_once_and_reported_once() -> None:
    run_on_ranks(check_times, 2)


def check_untimed(group: CommunicationHandler) -> None:
    assert group.all_reduce(torch.ones(4)).sum() == 4 * group.world_size
    assert group.take_times() == ({}, {}, {})


def on_another_group(
    group: CommunicationHandler, check: Callable[[CommunicationHandler], None], port: int, options: dict[str, Any]
) -> str:
    """Do a check on a group with other options; return what carries its bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_PORT", str(port))
        with ProcessGroupManager(torch.device("cpu"), timeout_seconds=60, **options) as second:
            check(second.tensor_parallel)
            carrier = second.tensor_parallel.carrier
            group.barrier()
            return carrier


def test_over_gloo_collectives_are_timed_likewise() -> None:
    assert run_on_ranks(on_another_group, 2, check_times, free_port(), {"collectives": "gloo"}) == ["gloo"] * 2


@pytest.mark.parametrize("collectives", ["shared-memory", "gloo"])
def test_timing_can_be_left_out(collectives: str) -> None:
    options = {"collectives": collectives, "is_timed": False}
    assert run_on_ranks(on_another_group, 2, check_untimed, free_port(), options) == [collectives] * 2


def check_copy(group: CommunicationHandler) -> None:
    x = rank_tensor(9, 4, 6).requires_grad_()
    y = collectives.copy_to_group(x, group)
    equal(y, x)
    torch.autograd.backward(y, rank_tensor(group.rank, 4, 6))
    assert x.grad is not None
    equal(x.grad, torch.stack(all_tensors(group, 4, 6)).sum(0))


def check_reduce(group: CommunicationHandler) -> None:
    x = rank_tensor(group.rank, 4, 6).requires_grad_()
    y = collectives.reduce_from_group(x, group)
    equal(y, torch.stack(all_tensors(group, 4, 6)).sum(0))
    equal(x.detach(), rank_tensor(group.rank, 4, 6))
    gradient = rank_tensor(9, 4, 6)
    torch.autograd.backward(y, gradient)
    assert x.grad is not None
    equal(x.grad, gradient)


def check_gather_from_group(group: CommunicationHandler) -> None:
    x = rank_tensor(group.rank, 4, 6).requires_grad_()
    y = collectives.gather_from_group(x, group)
    equal(y, torch.cat(all_tensors(group, 4, 6), -1))
    gradient = rank_tensor(9, *y.shape)
    torch.autograd.backward(y, gradient)
    assert x.grad is not None
    equal(x.grad, gradient.chunk(group.world_size, -1)[group.rank])


def check_scatter(group: CommunicationHandler) -> None:
    x = rank_tensor(9, 4, 2 * group.world_size).requires_grad_()
    y = collectives.scatter_to_group(x, group)
    equal(y, x.chunk(group.world_size, -1)[group.rank])
    torch.autograd.backward(y, rank_tensor(group.rank, 4, 2))
    assert x.grad is not None
    equal(x.grad, torch.cat(all_tensors(group, 4, 2), -1))


def check_reduce_scatter_to_group(group: CommunicationHandler) -> None:
    x = rank_tensor(group.rank, 2 * group.world_size, 3).requires_grad_()
    y = collectives.reduce_scatter_to_group(x, group)
    whole = torch.stack(all_tensors(group, *x.shape)).sum(0)
    equal(y, whole.chunk(group.world_size)[group.rank])
    torch.autograd.backward(y, rank_tensor(group.rank, 2, 3))
    assert x.grad is not None
    equal(x.grad, torch.cat(all_tensors(group, 2, 3)))


def check_without_gradients(group: CommunicationHandler) -> None:
    n = group.world_size
    shape = (2 * n, 3 * n)
    everyones = all_tensors(group, *shape)
    total = torch.stack(everyones).sum(0)
    with torch.inference_mode():
        equal(collectives.copy_to_group(everyones[group.rank], group), everyones[group.rank])
        equal(collectives.gather_from_group(everyones[group.rank], group), torch.cat(everyones, -1))
        equal(collectives.scatter_to_group(everyones[0], group), everyones[0].chunk(n, -1)[group.rank])
        equal(collectives.reduce_scatter_to_group(everyones[group.rank], group), total.chunk(n)[group.rank])
        equal(collectives.reduce_from_group(everyones[group.rank].clone(), group), total)


def check_replica_gradients(group: CommunicationHandler) -> None:
    spec = ShardSpec(0, (ShardPart("q", 12, 12, 4), ShardPart("k", 4, 4, 2), ShardPart("v", 2, 2, 1)))
    parameter = rank_tensor(9, spec.local_size, 3).requires_grad_()
    shared = collectives.sum_replica_gradients(parameter, spec, group)
    equal(shared, parameter)
    torch.autograd.backward(shared, rank_tensor(group.rank, *parameter.shape))
    everyones = all_tensors(group, *parameter.shape)
    pair = everyones[group.rank // 2 * 2 : group.rank // 2 * 2 + 2]
    expected = torch.cat([everyones[group.rank][:3], sum(pair)[3:5], sum(everyones)[5:]])  # type: ignore[index]
    assert parameter.grad is not None
    equal(parameter.grad, expected)


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize(
    "check", [check_copy, check_reduce, check_gather_from_group, check_scatter, check_reduce_scatter_to_group]
)
def test_backward_is_the_transpose_of_forward(check: Callable[[CommunicationHandler], None], tp_size: int) -> None:
    run_on_ranks(check, tp_size)


@pytest.mark.parametrize("tp_size", SIZES)
def test_results_are_the_same_without_gradients(tp_size: int) -> None:
    run_on_ranks(check_without_gradients, tp_size)


def test_gradients_of_replicas_add_up_and_others_stay() -> None:
    run_on_ranks(check_replica_gradients, 4)


def fail_on_rank_1(group: CommunicationHandler) -> None:
    if group.rank == 1:
        raise KeyError("a reason of its own")
    group.barrier()


def die_on_rank_1(group: CommunicationHandler) -> None:
    if group.rank == 1:
        os._exit(3)
    group.barrier()


def test_a_rank_that_raises_fails_the_test_with_its_traceback() -> None:
    with pytest.raises(RankFailedError, match=r"rank 1: (.|\n)*KeyError: 'a reason of its own'"):
        run_on_ranks(fail_on_rank_1, 2)


def test_a_rank_that_dies_leaves_nobody_hanging() -> None:
    with pytest.raises(RankFailedError, match="rank 1: died"):
        run_on_ranks(die_on_rank_1, 2)


def rank_and_size(group: CommunicationHandler) -> tuple[int, int]:
    return group.rank, group.world_size


def test_results_come_back_in_rank_order() -> None:
    assert run_on_ranks(rank_and_size, 3) == [(0, 3), (1, 3), (2, 3)]
