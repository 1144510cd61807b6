"""What the ranks of `ryzanstein bench collectives` are told, and what they tell."""

from dataclasses import dataclass

OPERATIONS = ("all_reduce", "all_gather", "broadcast")
HIDDEN_SIZE = 2048  # of the [M, 2048] bfloat16 that ranks exchange: hidden states of M tokens
NUM_TOKENS = (1, 8, 32, 256, 512, 4096)  # up to 16 MiB; 256 are 1 MiB


@dataclass(frozen=True, kw_only=True)
class CollectivesTask:
    """One measurement, of all ranks at once."""

    carrier: str  # one of `engine.protocol.config.COLLECTIVES`
    results: str  # directory where each rank leaves a `CollectivesSample`, in a file of its own


@dataclass(frozen=True, kw_only=True)
class CollectiveSample:
    """One operation of one size on one rank: seconds of a call."""

    operation: str
    num_tokens: int
    seconds: float
    waiting: float | None  # of these, for slower ranks; None where that is not known
    copy_seconds: float  # of a plain copy of as many bytes, by all ranks at once, just after


@dataclass(frozen=True, kw_only=True)
class CollectivesSample:
    """What one rank measured."""

    samples: tuple[CollectiveSample, ...]
