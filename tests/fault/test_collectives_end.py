"""Ranks that share memory, when one of them is killed or stopped: the others raise soon, and name it."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

import pytest
import torch

from engine.communication.process_group import ProcessGroupManager
from tests.leftovers import Leftovers
from tests.ports import free_port

END_SECONDS = 60.0  # generous: only a hang should exceed it
SOON = 5.0


def work_until_it_fails(pipe: Connection, rank: int, size: int, port: int, timeout_seconds: float) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    group = ProcessGroupManager(
        torch.device("cpu"), timeout_seconds=timeout_seconds, collectives="shared-memory"
    ).tensor_parallel
    tensor = torch.zeros(100_000)
    pipe.send("works")
    try:
        while True:
            group.all_reduce(tensor)
            group.gather(tensor)
    except RuntimeError as error:
        pipe.send((str(error), time.monotonic()))
    pipe.recv()  # until it is killed


@contextmanager
def working_ranks(size: int, timeout_seconds: float) -> Iterator[tuple[list[ForkServerProcess], list[Connection]]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    port = free_port()
    processes, pipes = [], []
    with Leftovers() as leftovers:
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, size, port, timeout_seconds)
            process = context.Process(target=work_until_it_fails, args=arguments, daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        try:
            for pipe in pipes:
                assert pipe.poll(END_SECONDS)
                assert pipe.recv() == "works"
            time.sleep(0.2)
            yield processes, pipes
        finally:
            for process in processes:
                process.kill()
                process.join()
        leftovers.check([])


def signal_rank(process: ForkServerProcess, number: signal.Signals) -> float:
    assert process.pid is not None
    os.kill(process.pid, number)
    return time.monotonic()


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named_by_all_others_at_once(victim: int) -> None:
    with working_ranks(3, timeout_seconds=60) as (processes, pipes):
        killed_at = signal_rank(processes[victim], signal.SIGKILL)
        for rank in {0, 1, 2} - {victim}:
            assert pipes[rank].poll(END_SECONDS)
            text, ended_at = pipes[rank].recv()
            assert text.startswith(f"rank {victim} died before it came to ")
            assert ended_at - killed_at < SOON


def test_a_stopped_rank_is_named_when_the_time_is_over() -> None:
    with working_ranks(3, timeout_seconds=5) as (processes, pipes):
        signal_rank(processes[1], signal.SIGSTOP)
        for rank in (0, 2):
            assert pipes[rank].poll(END_SECONDS)
            text, _ = pipes[rank].recv()
            assert text.startswith("rank 1 has not come to ")
            assert "within 5" in text


def test_nothing_is_left_of_ranks_that_are_all_killed() -> None:
    with working_ranks(2, timeout_seconds=60) as (processes, _):
        for process in processes:
            signal_rank(process, signal.SIGKILL)
