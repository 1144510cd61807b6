"""Ranks as processes that share memory, or find that they cannot."""

import logging
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.communication.handler import CommunicationHandler
from engine.communication.meeting import CannotShareError, share_memory
from engine.communication.process_group import ProcessGroupManager
from tests.disks import mounted_disk
from tests.distributed import run_on_ranks
from tests.ports import free_port


def carrier(group: CommunicationHandler) -> str:
    return group.carrier


def test_ranks_on_one_machine_share_memory() -> None:
    assert run_on_ranks(carrier, 2) == ["shared-memory"] * 2


def mix(group: CommunicationHandler, count: int) -> int:
    """Do many collectives of all kinds and sizes, each with a result that every rank knows."""
    choice = random.Random(0)
    n = group.world_size
    everyone = n * (n + 1) // 2
    for number in range(count):
        size = choice.choice((1, 2, 5, 33, 700)) * n
        kind = choice.randrange(6)
        own = torch.full((size,), group.rank + 1 + number % 7, dtype=torch.float32)
        total = everyone + n * (number % 7)
        if kind == 0:
            assert group.all_reduce(own)[-1] == total
        elif kind == 1:
            assert group.all_gather(own)[-1] == n + number % 7
        elif kind == 2:
            gathered = group.gather(own)
            assert gathered is None or gathered[size - 1 :: size].tolist() == [
                rank + 1 + number % 7 for rank in range(n)
            ]
        elif kind == 3:
            source = number % n
            assert group.broadcast(own, source)[-1] == source + 1 + number % 7
        elif kind == 4:
            assert group.reduce_scatter(own)[-1] == total
        else:
            group.barrier()
    return count


def nothing(group: CommunicationHandler) -> int:
    return group.rank


def test_a_rank_with_nothing_to_do_may_leave_while_others_still_come() -> None:
    for _ in range(20):
        assert run_on_ranks(nothing, 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("tp_size", "count"), [(2, 5_000), (3, 5_000), pytest.param(2, 100_000, marks=pytest.mark.slow)]
)
def test_thousands_of_collectives_of_all_kinds_are_right(tp_size: int, count: int) -> None:
    assert run_on_ranks(mix, tp_size, count) == [count] * tp_size


def use_gloo(group: CommunicationHandler, port: int, directory: str) -> tuple[str, list[str], float]:
    """Join a second group, of ranks that find too little shared memory."""
    assert group.carrier == "shared-memory"  # gloo has one group a process
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("engine.communication.process_group")
    logger.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_PORT", str(port))
        with ProcessGroupManager(torch.device("cpu"), timeout_seconds=60, shared_memory=Path(directory)) as second:
            total = second.tensor_parallel.all_reduce(torch.ones(3))
            group.barrier()
            found = second.tensor_parallel.carrier
    logger.removeHandler(handler)
    return found, warnings, total.sum().item()


def test_without_room_all_ranks_use_gloo_and_one_says_why(tmp_path: Path) -> None:
    with mounted_disk(tmp_path / "small", "64k") as directory:
        first, second = run_on_ranks(use_gloo, 2, free_port(), str(directory))
    assert first[0] == second[0] == "gloo"
    assert first[2] == second[2] == 6
    assert second[1] == []
    (warning,) = first[1]
    assert warning.startswith("the ranks use gloo, which is slower, since they cannot share memory: ")
    assert f"{directory} has 64.0 KiB of 64.0 KiB left, and the ranks need 1.0 MiB of it" in warning


def insist(_: CommunicationHandler, port: int, directory: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ValueError, match="--collectives shared-memory") as failure:
            ProcessGroupManager(
                torch.device("cpu"), timeout_seconds=60, collectives="shared-memory", shared_memory=Path(directory)
            )
    return str(failure.value)


def test_where_shared_memory_is_asked_for_and_cannot_be_had_all_ranks_say_why(tmp_path: Path) -> None:
    missing = f"{tmp_path}/none gives no memory: No such file or directory"
    errors = run_on_ranks(insist, 2, free_port(), str(tmp_path / "none"))
    assert errors == [f"--collectives shared-memory: {missing}"] * 2


def with_kernels_of_other_sources(_: CommunicationHandler, port: int) -> str:
    def refuse(*_: object) -> None:
        raise ValueError("kernels.so was compiled from other sources")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_PORT", str(port))
        patch.setattr("engine.communication.meeting.KernelLibrary", refuse)
        with pytest.raises(ValueError, match="--collectives auto: ") as failure:
            ProcessGroupManager(torch.device("cpu"), timeout_seconds=60)
    return str(failure.value)


def test_ranks_whose_kernels_are_of_other_sources_say_which_collectives_need_none() -> None:
    errors = run_on_ranks(with_kernels_of_other_sources, 2, free_port())
    told = "--collectives auto: kernels.so was compiled from other sources; --collectives gloo needs no kernels"
    assert errors == [told] * 2


def pretend_to_be_elsewhere(group: CommunicationHandler) -> tuple[str, bool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.communication.meeting.machine", lambda: f"machine {group.rank}")
        with pytest.raises(CannotShareError) as failure:
            share_memory(
                dist.PrefixStore("again", group.store),  # type: ignore[attr-defined]
                group.rank,
                group.world_size,
                timeout_seconds=60,
                spin_seconds=0,
                is_timed=True,
                directory=Path("/dev/shm"),
            )
    return str(failure.value), failure.value.is_unexpected


def test_ranks_on_several_machines_do_not_share_memory_and_that_is_no_surprise() -> None:
    assert (
        run_on_ranks(pretend_to_be_elsewhere, 2)
        == [("they are not all on one machine, or in one container", False)] * 2
    )


def test_collectives_of_cpus_are_refused_on_cuda() -> None:
    with pytest.raises(ValueError, match="--collectives gloo is for ranks on CPUs: on CUDA devices they use NCCL"):
        ProcessGroupManager(torch.device("cuda"), collectives="gloo")
