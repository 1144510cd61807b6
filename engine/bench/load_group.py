"""Runs the ranks of one measurement of `ryzanstein bench load`, from their start to their samples."""

import sys
import tempfile
import time
from pathlib import Path

import msgspec

from engine.bench.load_messages import FileRange, LoadSample, LoadTask, error_name, result_name
from engine.orchestrator.launcher import RankProcesses, describe_exit

RANK_COMMAND = (sys.executable, "-P", "-m", "engine.bench.load_rank")
POLL_SECONDS = 0.02
SETTLE_SECONDS = 5.0  # in which ranks end after one has failed


def run_group(
    directory: Path, world_size: int, plain: tuple[tuple[FileRange, ...], ...] = ()
) -> tuple[LoadSample, ...]:
    """Start fresh processes that load a checkpoint, or touch plain ranges, at once; return what each measured.

    Raises:
        ValueError: what a rank says of the checkpoint.
        RuntimeError: naming the rank that ended otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="ryzanstein-bench-") as name:
        folder = Path(name)
        task_path = folder / "task.json"
        task_path.write_bytes(msgspec.json.encode(LoadTask(directory=str(directory), results=name, plain=plain)))
        ranks = RankProcesses(task_path, world_size, RANK_COMMAND)
        try:
            _wait(ranks, world_size)
            _raise_for_failure(folder, ranks.dead())
        finally:
            ranks.kill()
        contents = [(folder / result_name(rank)).read_bytes() for rank in range(world_size)]
    return tuple(msgspec.json.decode(content, type=LoadSample) for content in contents)


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
