"""What the command line hands to processes of the engine that are no ranks, as JSON in their one argument.

python -m engine.checkpoint shard|inspect|verify|export JSON
python -m engine.bench load|limits|decode|collectives JSON
"""

from dataclasses import dataclass

from engine.protocol.config import KERNELS, MODEL_DTYPES, QUANTIZATIONS, check_options, option

MOST_TOKENS = 2**20  # of a prompt or a batch that is measured
MOST_RANKS = 256  # that exchange data; they are all on one machine
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
    quantization: str = option("none", "type to store the matrices in, as serve has it", choices=QUANTIZATIONS)
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


@dataclass(frozen=True, kw_only=True)
class BenchLimitsCommand:
    """Measure what this machine allows: reading memory and multiplying matrices, by cores."""

    runs: int = option(5, "times that each is measured, in turns")
    json: bool = option(False, "write one JSON document instead of a table")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class BenchCollectivesCommand:
    """Measure what it takes ranks of this machine to exchange data."""

    tensor_parallel_size: int = option(2, "ranks that exchange data", short="-tp")
    runs: int = option(3, "times that each way is measured, in turns")
    json: bool = option(False, "write one JSON document instead of a table")

    def __post_init__(self) -> None:
        check_options(self)
        if self.tensor_parallel_size == 1:
            raise ValueError("--tensor-parallel-size must be at least 2: one rank has nobody to exchange data with")
        if self.tensor_parallel_size > MOST_RANKS:
            raise ValueError(f"--tensor-parallel-size must be at most {MOST_RANKS}, not {self.tensor_parallel_size}")


@dataclass(frozen=True, kw_only=True)
class BenchDecodeCommand:
    """Measure steps of a real engine beside what the machine allows."""

    model: str
    tensor_parallel_size: int = option(1, "ranks that the model is split over", short="-tp")
    batch: tuple[str, ...] = option(("1", "8", "32"), "numbers of sequences that decode at once", unit="sequences")
    context: tuple[str, ...] = option(("256",), "tokens that each sequence has before it decodes", unit="tokens")
    prefill: tuple[str, ...] = option(("512",), "lengths of prompts that are computed alone", unit="tokens")
    steps: int = option(16, "decode steps of each run")
    runs: int = option(3, "times that each is measured, in turns")
    threads: int | None = option(None, "of each rank; the cores are divided over the ranks when left out")
    compare: bool = option(False, "also measure one rank, with the threads of one of them and of all, in turns")
    dtype: str = option("auto", "type of weights and arithmetic; auto takes the checkpoint's", choices=MODEL_DTYPES)
    kernels: str = option("auto", "what computes on a CPU; auto takes the fastest that there is", choices=KERNELS)
    quantization: str = option("none", "type of the matrices in memory", choices=QUANTIZATIONS)
    batch_invariant: bool = option(False, "compute as serve --batch-invariant does, and also without, in turns")
    json: bool = option(False, "write one JSON document instead of a table")

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("batch", "context", "prefill"):
            self.numbers(name)
        if self.compare and self.tensor_parallel_size == 1:
            raise ValueError("--compare compares several ranks with one: give --tensor-parallel-size")

    def numbers(self, name: str) -> tuple[int, ...]:
        """Return an option's list as numbers.

        Raises:
            ValueError: naming the option, if it has something else.
        """
        words: tuple[str, ...] = getattr(self, name)
        if not all(word.isdecimal() and 1 <= int(word) <= MOST_TOKENS for word in words):
            raise ValueError(f"--{name} must be numbers between 1 and {MOST_TOKENS}, not {','.join(words)}")
        return tuple(map(int, words))
