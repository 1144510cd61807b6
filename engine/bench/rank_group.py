"""Runs the ranks of one measurement: fresh processes, from their start to what each has measured."""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from engine.orchestrator.launcher import RankProcesses, describe_exit

POLL_SECONDS = 0.02
SETTLE_SECONDS = 5.0  # in which ranks end after one has failed

T = TypeVar("T")


def run_ranks(module: str, make_task: Callable[[str], object], world_size: int, sample_type: type[T]) -> tuple[T, ...]:
    """Start `python -m module TASK` for each rank; return what each left in its `result_name`.

    Args:
        module: of the engine. Its exit code is 0, or anything else after a failure.
        make_task: gets the directory for results, and returns what all ranks are told.
        world_size: how many there are.
        sample_type: of what each measures.

    Raises:
        ValueError: what a rank says in its `error_name`.
        RuntimeError: naming the rank that ended otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="ryzanstein-bench-") as name:
        folder = Path(name)
        task_path = folder / "task.json"
        task_path.write_bytes(msgspec.json.encode(make_task(name)))
        ranks = RankProcesses(task_path, world_size, (sys.executable, "-P", "-m", module))
        try:
            _wait(ranks, world_size)
            _raise_for_failure(folder, ranks.dead())
        finally:
            ranks.kill()
        contents = [(folder / result_name(rank)).read_bytes() for rank in range(world_size)]
    return tuple(msgspec.json.decode(content, type=sample_type) for content in contents)


def result_name(rank: int) -> str:
    """Return the name of the file that a rank leaves its sample in."""
    return f"rank{rank}.json"


def error_name(rank: int) -> str:
    """Return the name of the file that a rank leaves what a user did wrong in."""
    return f"rank{rank}.error"


def _wait(ranks: RankProcesses, world_size: int) -> None:
    """Wait until all have ended; after a failure for a moment only, in which others say what they found."""
    deadline = float("inf")
    while len(dead := ranks.dead()) < world_size and time.monotonic() < deadline:
        if any(dead.values()):
            deadline = min(deadline, time.monotonic() + SETTLE_SECONDS)
        time.sleep(POLL_SECONDS)


def _raise_for_failure(folder: Path, codes: dict[int, int]) -> None:
    for rank in sorted(codes):
        if (folder / error_name(rank)).is_file():
            raise ValueError((folder / error_name(rank)).read_text())
    for rank, code in sorted(codes.items(), key=lambda item: item[1]):  # signals first: they came first
        if code:
            raise RuntimeError(f"rank {rank} {describe_exit(code)}")
