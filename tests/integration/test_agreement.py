"""Ranks that succeed or fail together: what one fails with reaches all, soon, and nobody hangs."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Self

import pytest
import torch

from engine.checkpoint.agreement import GroupAgreement
from engine.communication.handler import CommunicationHandler
from engine.communication.process_group import ProcessGroupManager
from tests.distributed import run_on_ranks
from tests.ports import free_port

END_SECONDS = 60.0  # generous: only a hang should exceed it
SOON = 5.0  # what is promised from a failure to its being known everywhere

Work = Callable[[CommunicationHandler, GroupAgreement], object]
Ending = tuple[str, str, float]  # the error's class, its text, and when it was raised


def end_of(group: CommunicationHandler, work: Work, seconds: float = 60.0) -> Ending:
    """Do a piece of work, and return how it ended."""
    try:
        with GroupAgreement(group, timeout_seconds=seconds) as agreement:
            work(group, agreement)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic()
    return "", "", time.monotonic()


def work_for_long(agreement: GroupAgreement) -> None:
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        agreement.check()
        time.sleep(0.01)
    raise AssertionError("nobody has told of a failure")


# --- ranks that end by themselves ------------------------------------------------------------------------------------


class Fail:
    """Fails on some ranks with an error each, while the others work on, or wait for what rank 0 shares."""

    def __init__(self, errors: dict[int, BaseException], *, others: str = "work", after: float = 0.0) -> None:
        self.errors, self.others, self.after = errors, others, after

    def __call__(self, group: CommunicationHandler, agreement: GroupAgreement) -> None:
        if group.rank in self.errors:
            time.sleep(self.after)
            raise self.errors[group.rank]
        if self.others == "work":
            work_for_long(agreement)
        elif self.others == "share":
            agreement.share("what rank 0 never gives", lambda: b"")


def fail_and_go_on(group: CommunicationHandler, work: Fail) -> tuple[Ending, bytes]:
    began = time.monotonic()
    kind, text, _ = end_of(group, work)
    assert time.monotonic() - began - work.after < SOON
    with GroupAgreement(group) as agreement:
        shared = agreement.share("more", lambda: b"still there")
    return (kind, text, 0.0), shared


@pytest.mark.parametrize("others", ["work", "share", "nothing"])
@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("model: it is torn"), "ValueError", "model: it is torn"),
        (OSError(5, "Input/output error"), "RuntimeError", "OSError: [Errno 5] Input/output error"),
        (KeyError("a\nb"), "RuntimeError", "KeyError: 'a\\nb'"),
        (ValueError("two\nlines, and \udc80"), "ValueError", "two lines, and \\udc80"),
    ],
)
def test_one_ranks_failure_is_that_of_all_and_the_group_goes_on(
    error: Exception, kind: str, text: str, others: str
) -> None:
    for ending, shared in run_on_ranks(fail_and_go_on, 3, Fail({0: error}, others=others, after=0.2)):
        assert ending == (kind, text, 0.0)
        assert shared == b"still there"


def test_of_several_failures_the_lowest_ranks_is_everyones() -> None:
    errors: dict[int, BaseException] = {2: ValueError("of rank 2"), 1: RuntimeError("of rank 1")}
    for ending, _ in run_on_ranks(fail_and_go_on, 3, Fail(errors, others="nothing")):
        assert ending[:2] == ("RuntimeError", "RuntimeError: of rank 1")


def interrupt(group: CommunicationHandler) -> str:
    if group.rank == 1:
        try:
            with GroupAgreement(group):
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            return "interrupted"
    return end_of(group, lambda _, agreement: work_for_long(agreement))[1]


def test_an_interrupt_leaves_at_once_and_is_a_failure_for_the_others() -> None:
    first, interrupted, last = run_on_ranks(interrupt, 3)
    assert interrupted == "interrupted"
    assert first == last == "KeyboardInterrupt: KeyboardInterrupt"


def share_much(group: CommunicationHandler, size: int) -> tuple[int, int]:
    content = torch.arange(size, dtype=torch.uint8).numpy().tobytes()
    with GroupAgreement(group) as agreement:
        shared = agreement.share("content", lambda: content)
        gathered = agreement.gather("contents", content[group.rank :])
    assert shared == content
    assert gathered == ([content[rank:] for rank in range(group.world_size)] if group.rank == 0 else [])
    return len(shared), len(gathered)


@pytest.mark.parametrize("size", [0, 1, 20 << 20])
def test_what_is_shared_and_gathered_may_be_larger_than_one_value_of_the_store(size: int) -> None:
    assert run_on_ranks(share_much, 2, size) == [(size, 2), (size, 0)]


def num_process_descriptors() -> int:
    links = list(Path("/proc/self/fd").iterdir())
    return sum("pidfd" in str(link.readlink()) for link in links if link.is_symlink())


def use_often(group: CommunicationHandler) -> tuple[list[list[str]], list[int]]:
    keys, descriptors = [], [num_process_descriptors()]
    for _ in range(5):
        share_much(group, 1000)
        group.barrier()
        keys.append([key for key in group.store.list_keys() if "ryzanstein/agreement-" in key])
        descriptors.append(num_process_descriptors())
        group.barrier()
    return keys, descriptors


def test_an_agreement_leaves_neither_keys_nor_descriptors_behind() -> None:
    for keys, descriptors in run_on_ranks(use_often, 3):
        assert len(set(descriptors)) == 1
        assert keys == [[]] * 5


def slow_and_quick(group: CommunicationHandler) -> str:
    def work(_: CommunicationHandler, agreement: GroupAgreement) -> None:
        deadline = time.monotonic() + 5
        while group.rank == 1 and time.monotonic() < deadline:
            agreement.check()
            time.sleep(0.01)

    return end_of(group, work, seconds=4)[1]


def test_a_rank_that_works_for_longer_than_the_timeout_is_waited_for() -> None:
    assert run_on_ranks(slow_and_quick, 2) == ["", ""]


def silent_and_quick(group: CommunicationHandler) -> str:
    text = end_of(group, lambda *_: time.sleep(3 * group.rank), seconds=1.0)[1]
    group.barrier()  # the store ends with rank 0, and rank 1 still asks it how the agreement ended
    return text


def test_a_rank_that_is_silent_for_longer_than_the_timeout_fails_all() -> None:
    assert run_on_ranks(silent_and_quick, 2) == ["rank 1 does not answer"] * 2


# --- ranks that are ended --------------------------------------------------------------------------------------------


class Ranks:
    """Processes that each do a piece of work and tell how it ended; killed at the end."""

    def __init__(self, size: int, work: Work, seconds: float) -> None:
        context = multiprocessing.get_context("forkserver")
        self.pipes: list[Connection] = []
        self.processes: list[ForkServerProcess] = []
        port = free_port()
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_be_rank, args=(theirs, rank, size, port, work, seconds), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __enter__(self) -> Self:
        for pipe in self.pipes:  # all work now
            assert pipe.poll(END_SECONDS)
            assert pipe.recv() == "works"
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def signal(self, rank: int, number: signal.Signals) -> float:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)
        return time.monotonic()

    def endings(self, ranks: list[int]) -> list[Ending]:
        found: dict[int, Ending] = {}
        waiting: dict[Any, int] = {self.pipes[rank]: rank for rank in ranks}
        deadline = time.monotonic() + END_SECONDS
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            assert ready, f"rank {list(waiting.values())} hangs"
            for pipe in ready:
                assert isinstance(pipe, Connection)
                found[waiting.pop(pipe)] = pipe.recv()
        return [found[rank] for rank in ranks]


def _be_rank(pipe: Connection, rank: int, size: int, port: int, work: Work, seconds: float) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    group = ProcessGroupManager(torch.device("cpu")).tensor_parallel

    def tell_and_work(group: CommunicationHandler, agreement: GroupAgreement) -> None:
        agreement.share("start", lambda: b"")
        pipe.send("works")
        work(group, agreement)

    pipe.send(end_of(group, tell_and_work, seconds))
    os._exit(0)


def work_on(_: CommunicationHandler, agreement: GroupAgreement) -> None:
    work_for_long(agreement)


def wait_for_the_others(group: CommunicationHandler, agreement: GroupAgreement) -> None:
    if group.rank == 1:
        work_for_long(agreement)


@pytest.mark.parametrize("work", [work_on, wait_for_the_others])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_is_named_on_all_others(victim: int, work: Work) -> None:
    with Ranks(3, work, seconds=60) as ranks:
        if work is wait_for_the_others:
            time.sleep(0.5)  # ranks 0 and 2 wait for rank 1 by now
            victim = 1 if victim == 2 else victim
        killed_at = ranks.signal(victim, signal.SIGKILL)
        endings = ranks.endings([rank for rank in range(3) if rank != victim])
    for kind, text, ended_at in endings:
        assert (kind, text) == ("RuntimeError", f"rank {victim} died")
        assert ended_at - killed_at < SOON


def test_a_rank_that_is_stopped_is_named_when_the_time_is_over() -> None:
    with Ranks(3, wait_for_the_others, seconds=4) as ranks:
        ranks.signal(1, signal.SIGSTOP)
        endings = ranks.endings([0, 2])
    assert {ending[:2] for ending in endings} == {("RuntimeError", "rank 1 does not answer")}


def test_a_stopped_rank_that_keeps_the_store_does_not_hang_the_others() -> None:
    with Ranks(3, work_on, seconds=4) as ranks:
        ranks.signal(0, signal.SIGSTOP)
        endings = ranks.endings([1, 2])
    expected = "the ranks' store cannot be reached any more: no answer within 4 s"
    assert {ending[:2] for ending in endings} == {("RuntimeError", expected)}


def test_a_failure_does_not_wait_for_a_rank_that_is_stopped() -> None:
    with Ranks(3, FirstFails(), seconds=60) as ranks:
        ranks.signal(1, signal.SIGSTOP)
        began = time.monotonic()
        endings = ranks.endings([0, 2])
    for kind, text, ended_at in endings:
        assert (kind, text) == ("ValueError", "first")
        assert ended_at - began - FirstFails.after < SOON


class FirstFails:
    """Rank 0 fails after a moment, and the others work."""

    after = 1.0

    def __call__(self, group: CommunicationHandler, agreement: GroupAgreement) -> None:
        if group.rank == 0:
            time.sleep(self.after)
            raise ValueError("first")
        work_for_long(agreement)
