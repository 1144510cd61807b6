"""What the command line hands to processes of the engine that are no ranks, as JSON in their one argument.

python -m engine.checkpoint shard|inspect|verify|export JSON
python -m engine.bench load JSON
"""

from dataclasses import dataclass

from engine.protocol.config import MODEL_DTYPES, check_options, option

SMALLEST_FILE = 2**20  # bytes; a limit below it is a slip of the pen


@dataclass(frozen=True, kw_only=True)
class ShardCommand:
    """Write a distributed checkpoint.

    Raises:
        ValueError: (each command) naming the option, when a value is out of range.
    """

    source: str
    destination: str
    tensor_parallel_size: int = option(1, "ranks to split the model over", short="-tp")
    dtype: str = option("auto", "type to store weights in; auto keeps the checkpoint's", choices=MODEL_DTYPES)
    max_file_size: int | None = option(
        None, "most bytes in one file, such as 4GiB; a rank's weights are one file when left out", unit="bytes"
    )
    model_name: str | None = option(None, "name to give the checkpoint; that of the source when left out")
    progress: bool = option(True, "show how far it has come")

    def __post_init__(self) -> None:
        check_options(self)
        if self.max_file_size is not None and self.max_file_size < SMALLEST_FILE:
            raise ValueError(f"--max-file-size must be at least {SMALLEST_FILE} bytes, not {self.max_file_size}")


@dataclass(frozen=True, kw_only=True)
class InspectCommand:
    """Show what is in a checkpoint."""

    path: str
    json: bool = option(False, "write one JSON document instead of a table")


@dataclass(frozen=True, kw_only=True)
class VerifyCommand:
    """Check a checkpoint: every file, every tensor."""

    path: str
    json: bool = option(False, "write one JSON document instead of lines")
    progress: bool = option(True, "show how far it has come")


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write a Hugging Face directory."""

    source: str
    destination: str
    max_file_size: int = option(5 * 2**30, "most bytes in one file", unit="bytes")
    progress: bool = option(True, "show how far it has come")

    def __post_init__(self) -> None:
        check_options(self)
        if self.max_file_size < SMALLEST_FILE:
            raise ValueError(f"--max-file-size must be at least {SMALLEST_FILE} bytes, not {self.max_file_size}")


@dataclass(frozen=True, kw_only=True)
class BenchLoadCommand:
    """Measure how long loading takes, beside the plainest way to touch the same bytes."""

    model: str
    tensor_parallel_size: int = option(1, "ranks that load at once", short="-tp")
    runs: int = option(5, "times that each way is measured, in turns")
    cold: bool = option(True, "also measure with the files dropped from the page cache")
    json: bool = option(False, "write one JSON document instead of a table")

    def __post_init__(self) -> None:
        check_options(self)
