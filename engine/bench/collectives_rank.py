"""`python -m engine.bench.collectives_rank TASK`: a rank that times collectives, and plain copies beside them."""

import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from engine.bench.collectives_messages import (
    HIDDEN_SIZE,
    NUM_TOKENS,
    OPERATIONS,
    CollectiveSample,
    CollectivesSample,
    CollectivesTask,
)
from engine.bench.rank_group import error_name, result_name
from engine.communication.handler import CommunicationHandler
from engine.communication.process_group import ProcessGroupManager
from engine.protocol.errors import EXIT_USER_ERROR
from engine.worker.parent import die_with_parent

JOIN_SECONDS = 60.0
BATCHES = 5  # of calls, of which the median counts
BATCH_SECONDS = 5e-3  # that a batch takes at least, in calls that are counted beforehand
MOST_CALLS = 1000


def run(task_path: Path) -> int:
    """Measure once, leave the sample, and return the exit code."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is answered by the process that started this one
    torch.set_num_threads(1)
    task = msgspec.json.decode(task_path.read_bytes(), type=CollectivesTask)
    results, rank = Path(task.results), int(os.environ["RANK"])
    try:
        groups = ProcessGroupManager(torch.device("cpu"), timeout_seconds=JOIN_SECONDS, collectives=task.carrier)
    except ValueError as error:
        (results / error_name(rank)).write_text(str(error))
        return EXIT_USER_ERROR
    with groups:
        samples = tuple(
            _measure(groups.tensor_parallel, operation, num_tokens)
            for operation in OPERATIONS
            for num_tokens in NUM_TOKENS
        )
        groups.tensor_parallel.barrier()  # none leaves while another still uses a processor's time
    (results / result_name(rank)).write_bytes(msgspec.json.encode(CollectivesSample(samples=samples)))
    return 0


def _measure(group: CommunicationHandler, operation: str, num_tokens: int) -> CollectiveSample:
    tensor = torch.zeros((num_tokens, HIDDEN_SIZE), dtype=torch.bfloat16)
    copy = torch.empty_like(tensor)
    call = _calls(group, tensor)[operation]
    num_calls = _num_calls(group, call)
    batches = [_timed(group, operation, call, num_calls) for _ in range(BATCHES)]
    seconds, waiting = sorted(batches, key=lambda batch: batch[0])[BATCHES // 2]
    copies = [_batch(group, lambda: copy.copy_(tensor), num_calls) for _ in range(BATCHES)]
    return CollectiveSample(
        operation=operation,
        num_tokens=num_tokens,
        seconds=seconds,
        waiting=waiting,
        copy_seconds=statistics.median(copies),
    )


def _calls(group: CommunicationHandler, tensor: Tensor) -> dict[str, Callable[[], object]]:
    return {
        "all_reduce": lambda: group.all_reduce(tensor),
        "all_gather": lambda: group.all_gather(tensor),
        "broadcast": lambda: group.broadcast(tensor),
    }


def _num_calls(group: CommunicationHandler, call: Callable[[], object]) -> int:
    """Return how many calls make a batch: the same on all ranks."""
    call()
    seconds = torch.tensor([_batch(group, call, 2)], dtype=torch.float64)
    group.broadcast(seconds)
    return min(MOST_CALLS, max(1, int(BATCH_SECONDS / seconds.item())))


def _timed(
    group: CommunicationHandler, operation: str, call: Callable[[], object], num_calls: int
) -> tuple[float, float | None]:
    """Return the seconds of a call, as `_batch` does, and how many of them were waiting, where that is known."""
    group.take_times()
    seconds = _batch(group, call, num_calls)
    waiting = group.take_times().waiting.get(operation)
    return seconds, None if waiting is None else waiting.sum / num_calls


def _batch(group: CommunicationHandler, call: Callable[[], object], num_calls: int) -> float:
    """Return the seconds of a call, of so many one after the other, which all ranks begin at once."""
    group.barrier()
    began = time.perf_counter()
    for _ in range(num_calls):
        call()
    return (time.perf_counter() - began) / num_calls


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
