"""What the ranks of `ryzanstein bench load` are told, and what they tell."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FileRange:
    """Bytes `[start, stop)` of a file."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class LoadTask:
    """One measurement, of all ranks at once."""

    directory: str  # of the checkpoint
    quantization: str  # of its matrices, as `--quantization` has it
    results: str  # directory where each rank leaves a `LoadSample`, in a file of its own
    plain: tuple[tuple[FileRange, ...], ...] = ()  # what each rank maps and touches; empty: the ranks load the model


@dataclass(frozen=True, kw_only=True)
class LoadSample:
    """What one rank measured. Times are in seconds, from the moment at which all ranks began."""

    returned: float  # until load(), or mapping, was done
    metadata: float  # of these, until it knew what there is to load
    touched: float  # until every byte had been read once
    weight_bytes: int  # touched
    bytes_read: int  # of the checkpoint, as the loader counts
    storage_bytes: int | None  # read from a disk for this process; None where the system does not say
    memory_growth: int  # bytes of resident memory, from before load() to after the last touch
    peak_growth: int  # as much more as was resident at most
