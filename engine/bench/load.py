"""`ryzanstein bench load`: how long loading takes, beside the plainest way to touch the same bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from engine.bench.load_group import run_group
from engine.bench.load_messages import FileRange
from engine.bench.load_report import LoadBenchmark, Phase, Samples, phase_of
from engine.bench.page_cache import drop_files, read_files, resident_share
from engine.checkpoint.huggingface import weight_files
from engine.checkpoint.metadata import CheckpointMetadata
from engine.protocol.commands import BenchLoadCommand
from engine.protocol.model_config import ModelConfig
from engine.protocol.model_directory import find_model_directory, is_distributed

FEW = 0.01  # share of pages that may be in the page cache, or not, although all were dropped, or read
Ranges = tuple[tuple[FileRange, ...], ...]  # of each rank


def measure_load(command: BenchLoadCommand) -> LoadBenchmark:
    """Load a checkpoint in fresh processes, time and again.

    Files are dropped from the page cache for the cold runs, and in it afterwards.

    Raises:
        ValueError: naming the file or option, if the checkpoint cannot be loaded so.
    """
    subject = _Subject.open(command)
    notes: list[str] = []
    cold = _cold_phase(subject, command.runs, notes) if command.cold else None
    warm = _warm_phase(subject, command.runs, notes)
    return LoadBenchmark(
        path=str(subject.directory),
        form="huggingface" if subject.saved_tp_size is None else "distributed",
        saved_tensor_parallel_size=subject.saved_tp_size,
        tensor_parallel_size=command.tensor_parallel_size,
        dtype=subject.dtype if subject.quantization == "none" else subject.quantization,
        runs=command.runs,
        weight_bytes=tuple(item.weight_bytes for item in warm.first_load),
        warm=warm.phase,
        cold=cold.phase if cold else None,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Subject:
    """What is loaded, and what is touched beside it."""

    directory: Path
    dtype: str
    quantization: str
    saved_tp_size: int | None
    paths: tuple[Path, ...]
    plain: Ranges

    @classmethod
    def open(cls, command: BenchLoadCommand) -> "_Subject":
        directory = find_model_directory(command.model)
        config = ModelConfig.from_directory(directory)
        config.check_tensor_parallel_size(command.tensor_parallel_size)
        if not is_distributed(directory):
            paths = weight_files(directory)
            plain = shares_of(paths, command.tensor_parallel_size)
            return cls(directory, config.dtype, "none", None, tuple(paths), plain)
        metadata = CheckpointMetadata.read(directory)
        own = [[directory / file.name for file in metadata.files_of(rank)] for rank in range(metadata.tp_size)]
        paths = [path for files in own for path in files]
        if metadata.tp_size == command.tensor_parallel_size:
            plain = tuple(share for files in own for share in shares_of(files, 1))
        else:
            plain = shares_of(paths, command.tensor_parallel_size)
        return cls(directory, config.dtype, metadata.quantization, metadata.tp_size, tuple(paths), plain)

    def load(self) -> Samples:
        return run_group(self.directory, len(self.plain), self.quantization)

    def touch(self) -> Samples:
        return run_group(self.directory, len(self.plain), plain=self.plain)


def shares_of(paths: list[Path], count: int) -> Ranges:
    """Cut files, one after the other, into as many shares of about the same size.

    Raises:
        ValueError: naming a file that is not there.
    """
    sizes = [_size_of(path) for path in paths]
    starts = [0, *accumulate(sizes)]
    bounds = [starts[-1] * share // count for share in range(count + 1)]
    return tuple(
        tuple(
            FileRange(path=str(path), start=max(low - start, 0), stop=min(high - start, size))
            for path, start, size in zip(paths, starts, sizes, strict=False)
            if low < start + size and start < high
        )
        for low, high in pairwise(bounds)
    )


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class _Measured:
    phase: Phase
    first_load: Samples


def _warm_phase(subject: _Subject, runs: int, notes: list[str]) -> _Measured:
    read_files(subject.paths)
    resident = resident_share(subject.paths)
    if resident < 1 - FEW:
        notes.append(f"only {100 * resident:.0f}% of the files stay in the page cache: is there memory for all?")
    return _measure(subject, runs, lambda: None)


def _cold_phase(subject: _Subject, runs: int, notes: list[str]) -> _Measured | None:
    """Measure with the files dropped, if the system drops them."""
    drop_files(subject.paths)
    resident = resident_share(subject.paths)
    if resident > FEW:
        notes.append(
            f"no cold runs: {100 * resident:.0f}% of the files stay in the page cache, or the system tells only their "
            "owner how much; do other processes use them, or does their file system live in memory?"
        )
        return None
    return _measure(subject, runs, lambda: drop_files(subject.paths))


def _measure(subject: _Subject, runs: int, prepare: Callable[[], None]) -> _Measured:
    """Take turns; every other time the plain touch comes first, since what runs later may find a calmer machine."""
    loads: list[Samples] = []
    plains: list[Samples] = []
    for run in range(runs):
        turns = [(subject.load, loads), (subject.touch, plains)]
        for measure, samples in reversed(turns) if run % 2 else turns:
            prepare()
            samples.append(measure())
    return _Measured(phase_of(loads, plains), loads[0])
