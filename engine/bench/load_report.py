"""What `ryzanstein bench load` found: figures of several runs, as a table for people and as JSON for scripts."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from engine.bench.figures import Figure, gigabytes, percent, runs_words, spread
from engine.bench.load_messages import LoadSample
from engine.protocol.units import format_bytes, format_seconds

Samples = tuple[LoadSample, ...]  # one of each rank, of one measurement
SOURCES = {"distributed": "distributed checkpoint of {} ranks", "huggingface": "Hugging Face checkpoint"}
LABEL_WIDTH = 31
COLUMN_WIDTH = 40


@dataclass(frozen=True, kw_only=True)
class Phase:
    """All runs with the page cache warm, or cold.

    Seconds are the slowest rank's, from the moment at which all began; shares compare a load with the plain touch that
    was measured next to it.
    """

    load_seconds: Figure  # until load() returned
    metadata_seconds: Figure  # of these, until it was known what there is to load
    touched_seconds: Figure  # until all weights had been read once
    plain_seconds: Figure  # the same of the plain map
    plain_rate: Figure  # bytes a second, all ranks together, mapping included
    load_rate: Figure  # the same of a load, with load() included
    rate_share: Figure  # of the plain rate
    touch_rate: Figure  # bytes a second of the touching alone, once load() had returned
    touch_share: Figure  # of the plain loop's, once it had mapped
    memory_beyond_share: Figure  # resident memory that came with load() and touch, beyond the weights, as a share
    peak_beyond_share: Figure  # the same of what was resident at most
    bytes_read: tuple[int, ...]  # of the checkpoint, by each rank
    storage_bytes: tuple[int, ...] | None  # of these from a disk, medians; None where the system does not say


@dataclass(frozen=True, kw_only=True)
class LoadBenchmark:
    """The whole document."""

    path: str
    form: str
    saved_tensor_parallel_size: int | None
    tensor_parallel_size: int
    dtype: str
    runs: int
    weight_bytes: tuple[int, ...]  # of each rank
    warm: Phase
    cold: Phase | None
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """Return it as one JSON document."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode() + "\n"

    def to_table(self) -> str:
        """Return it as people read it."""
        return "\n".join([*self._head(), "", *self._rows(), *self._notes()]) + "\n"

    def _head(self) -> Iterator[str]:
        ranks = "1 rank" if self.tensor_parallel_size == 1 else f"{self.tensor_parallel_size} ranks"
        source = SOURCES[self.form].format(self.saved_tensor_parallel_size)
        yield f"{self.path}: {source}, loaded by {ranks} in {self.dtype}"
        sizes = ", ".join(format_bytes(size) for size in self.weight_bytes)
        yield f"weights of each rank: {sizes}; {runs_words(self.runs)}; times of the slowest rank"

    def _rows(self) -> Iterator[str]:
        phases = {"warm page cache": self.warm, **({"cold page cache": self.cold} if self.cold else {})}
        yield _line("", list(phases))
        for label, show in _ROWS.items():
            yield _line(label, [show(phase) for phase in phases.values()])

    def _notes(self) -> Iterator[str]:
        if self.notes:
            yield ""
        for note in self.notes:
            yield f"note: {note}"


def phase_of(loads: Sequence[Samples], plains: Sequence[Samples]) -> Phase:
    """Return the figures of measurements of both ways, as many of each, in the order in which they were taken."""
    pairs = list(zip(loads, plains, strict=True))
    return Phase(
        load_seconds=Figure.of([_slowest(load, lambda item: item.returned) for load in loads]),
        metadata_seconds=Figure.of([_slowest(load, lambda item: item.metadata) for load in loads]),
        touched_seconds=Figure.of([_slowest(load, lambda item: item.touched) for load in loads]),
        plain_seconds=Figure.of([_slowest(plain, lambda item: item.touched) for plain in plains]),
        plain_rate=Figure.of([_rate(plain) for plain in plains]),
        load_rate=Figure.of([_rate(load) for load in loads]),
        rate_share=Figure.of([_rate(load) / _rate(plain) for load, plain in pairs]),
        touch_rate=Figure.of([_touch_rate(load) for load in loads]),
        touch_share=Figure.of([_touch_rate(load) / _touch_rate(plain) for load, plain in pairs]),
        memory_beyond_share=Figure.of([_beyond(load, lambda item: item.memory_growth) for load in loads]),
        peak_beyond_share=Figure.of([_beyond(load, lambda item: item.peak_growth) for load in loads]),
        bytes_read=tuple(item.bytes_read for item in loads[0]),
        storage_bytes=_storage_bytes(loads),
    )


def _slowest(samples: Samples, seconds: Callable[[LoadSample], float]) -> float:
    return max(seconds(item) for item in samples)


def _rate(samples: Samples) -> float:
    return sum(item.weight_bytes for item in samples) / _slowest(samples, lambda item: item.touched)


def _touch_rate(samples: Samples) -> float:
    return sum(item.weight_bytes for item in samples) / _slowest(samples, lambda item: item.touched - item.returned)


def _beyond(samples: Samples, growth: Callable[[LoadSample], int]) -> float:
    return max(growth(item) / item.weight_bytes - 1 for item in samples)


def _storage_bytes(loads: Sequence[Samples]) -> tuple[int, ...] | None:
    by_rank = [[item.storage_bytes for item in samples] for samples in zip(*loads, strict=True)]
    known = [[size for size in sizes if size is not None] for sizes in by_rank]
    return tuple(int(statistics.median(sizes)) for sizes in known) if all(known) else None


def _line(label: str, cells: list[str]) -> str:
    return (f"{label:<{LABEL_WIDTH}}" + "".join(f"{cell:<{COLUMN_WIDTH}}" for cell in cells)).rstrip()


def _sizes(sizes: tuple[int, ...] | None) -> str:
    return "not told by the system" if sizes is None else ", ".join(format_bytes(size) for size in sizes)


_ROWS: dict[str, Callable[[Phase], str]] = {
    "load() returned": lambda phase: spread(phase.load_seconds, format_seconds),
    "  of which metadata": lambda phase: spread(phase.metadata_seconds, format_seconds),
    "all weights touched": lambda phase: spread(phase.touched_seconds, format_seconds),
    "plain map touched": lambda phase: spread(phase.plain_seconds, format_seconds),
    "touch rate after load()": lambda phase: spread(phase.touch_rate, gigabytes),
    "  of the plain loop's": lambda phase: spread(phase.touch_share, percent),
    "rate with load()": lambda phase: spread(phase.load_rate, gigabytes),
    "plain rate with mapping": lambda phase: spread(phase.plain_rate, gigabytes),
    "  load of plain": lambda phase: spread(phase.rate_share, percent),
    "memory beyond the weights": lambda phase: spread(phase.memory_beyond_share, percent),
    "  at its peak": lambda phase: spread(phase.peak_beyond_share, percent),
    "read by each rank": lambda phase: _sizes(phase.bytes_read),
    "  from a disk": lambda phase: _sizes(phase.storage_bytes),
}
