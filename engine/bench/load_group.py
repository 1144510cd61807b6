"""Runs the ranks of one measurement of `ryzanstein bench load`, from their start to their samples."""

from pathlib import Path

from engine.bench.load_messages import FileRange, LoadSample, LoadTask
from engine.bench.rank_group import run_ranks


def run_group(
    directory: Path, world_size: int, quantization: str = "none", plain: tuple[tuple[FileRange, ...], ...] = ()
) -> tuple[LoadSample, ...]:
    """Start fresh processes that load a checkpoint, or touch plain ranges, at once; return what each measured.

    Raises:
        ValueError: what a rank says of the checkpoint.
        RuntimeError: naming the rank that ended otherwise.
    """

    def make_task(results: str) -> LoadTask:
        return LoadTask(directory=str(directory), quantization=quantization, results=results, plain=plain)

    return run_ranks("engine.bench.load_rank", make_task, world_size, LoadSample)
