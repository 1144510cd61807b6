"""Runs a function on real ranks: processes that meet over gloo, as torchrun's would."""

import functools
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from engine.communication.handler import CommunicationHandler
from engine.communication.process_group import ProcessGroupManager
from tests.ports import free_port

P = ParamSpec("P")
R = TypeVar("R")

COLLECTIVE_SECONDS = 60.0
RUN_SECONDS = 150.0  # all of a call, the processes' start included
GRACE_SECONDS = 5.0  # for the other ranks, once one has failed


class RankFailedError(AssertionError):
    """A rank raised, died or hung; the message holds its traceback."""


def run_on_ranks(
    function: Callable[Concatenate[CommunicationHandler, P], R], tp_size: int, *args: P.args, **kwargs: P.kwargs
) -> list[R]:
    """Run `function(group, *args, **kwargs)` on `tp_size` processes and return the results in rank order.

    `function` must be importable, and arguments and results must pickle. Processes are kept between calls; each call
    joins a process group of its own and leaves it. Each rank has one torch thread.

    Raises:
        RankFailedError: when a rank raised (with its traceback), died, or took too long. No process is left hanging.
    """
    # Pickled here rather than by the pipe, which would pass tensors as handles of shared memory.
    job = pickle.dumps((function, args, kwargs))
    ranks = _pool()
    while len(ranks) < tp_size:
        ranks.append(_Rank())
    port = str(free_port())
    for index, rank in enumerate(ranks[:tp_size]):
        environment = {
            "RANK": str(index),
            "WORLD_SIZE": str(tp_size),
            "LOCAL_RANK": str(index),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "RES_OPTIONS": "timeout:1",  # as the launcher's ranks have it
        }
        rank.pipe.send_bytes(pickle.dumps((environment, job)))
    try:
        results: list[R] = _collect(ranks[:tp_size])
    except BaseException:
        for rank in ranks:
            rank.kill()
        ranks.clear()
        raise
    return results


class _Rank:
    """A process that takes one job after the other."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])  # imported once, not by each rank
        self.pipe, theirs = context.Pipe()
        self.process: ForkServerProcess = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


@functools.cache
def _pool() -> list[_Rank]:
    """The processes of this test session; they end with it, being daemons."""
    return []


def _collect(ranks: list[_Rank]) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[str] = []
    deadline = time.monotonic() + RUN_SECONDS
    waiting = {rank.pipe: index for index, rank in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            silent = ", ".join(str(index) for index in waiting.values())
            failures.append(f"no answer from rank {silent}")
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            index = waiting.pop(pipe)
            failure, result = _receive(pipe)
            if failure is None:
                results[index] = result
            else:
                failures.append(f"rank {index}: {failure}")
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    if failures:
        raise RankFailedError("\n".join(failures))
    return [results[index] for index in range(len(ranks))]


def _receive(pipe: Connection) -> tuple[str | None, Any]:
    try:
        answer: tuple[str | None, Any] = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return "died", None
    return answer


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            payload = pipe.recv_bytes()
        except EOFError:  # the tests are over
            sys.exit(0)
        pipe.send_bytes(pickle.dumps(_answer(payload)))


def _answer(payload: bytes) -> tuple[str | None, object]:
    try:
        environment, job = pickle.loads(payload)
        os.environ.update(environment)
        function, args, kwargs = pickle.loads(job)
        with ProcessGroupManager(torch.device("cpu"), timeout_seconds=COLLECTIVE_SECONDS) as groups:
            result = function(groups.tensor_parallel, *args, **kwargs)
        assert not torch.distributed.is_initialized(), "a group was not left"
        return None, result
    except Exception:  # whatever it is, it belongs to the test
        return traceback.format_exc(), None
