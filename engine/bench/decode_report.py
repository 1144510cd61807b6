"""What `ryzanstein bench decode` found, as a table for people and as JSON for scripts."""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from engine.bench.decode_costs import StepCost
from engine.bench.decode_memory import RankMemory
from engine.bench.figures import Figure, aligned, gigabytes, percent, runs_words, spread
from engine.bench.limits_report import Limit, operations
from engine.protocol.units import format_bytes, format_count, format_seconds

HEADINGS = (
    "",
    "turns",
    "a step",
    "tokens/s",
    "reads",
    "computes",
    "read time",
    "compute time",
    "of the roof",
    "in collectives",
    "waiting there",
)
NOTES = (
    "the roof is the larger of two times: to read what a step reads, and to multiply what it multiplies, at the rates",
    "measured before and after each turn on as many cores as the ranks have threads; turns count in which these were",
    "within 10% of each other, where there are any. In collectives: without the waiting there for slower ranks; gloo",
    "does not tell them apart",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of step on one setup. Seconds are each turn's mean."""

    phase: str  # "decode" or "prefill"
    batch: int
    context: int  # tokens of a sequence before the first step; for prefill, of the prompt
    num_steady: int  # turns in which the limits were the same before and after; only these count, if there are any
    step_seconds: Figure
    tokens_per_second: Figure
    cost: StepCost
    read_seconds: Figure  # at the rate measured before and after
    compute_seconds: Figure
    roof_share: Figure  # max(read, compute) of the step's time
    transfer_share: Figure | None  # of the turn in collectives, without waiting, on the rank with most; None: alone
    waiting_share: Figure | None  # likewise, waiting in them for slower ranks


@dataclass(frozen=True, kw_only=True)
class SetupReport:
    """One way to run the model."""

    name: str
    tensor_parallel_size: int
    threads: int  # of each rank
    batch_invariant: bool
    cores: int  # whose limits it is held against
    rows: tuple[Row, ...]
    memory: tuple[RankMemory, ...]  # of each rank, at the end


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How much faster the first setup is than another, turn by turn."""

    of: str
    over: str
    row: str
    speed_up: Figure
    roof_ratio: Figure  # what the machine allows
    share: Figure  # speed_up of roof_ratio


@dataclass(frozen=True, kw_only=True)
class DecodeBenchmark:
    """The whole document."""

    path: str
    dtype: str
    quantization: str
    kernels: str  # that computed
    runs: int
    steps: int
    setups: tuple[SetupReport, ...]
    ratios: tuple[Ratio, ...]
    limits: tuple[Limit, ...]
    bare_memory: int  # resident bytes of a process that only imported torch

    def to_json(self) -> str:
        """Return it as one JSON document."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode() + "\n"

    def to_table(self) -> str:
        """Return it as people read it."""
        parts = [self._head(), *map(self._setup_lines, self.setups), self._ratio_lines(), self._limit_lines()]
        return "\n\n".join("\n".join(part) for part in map(list, parts) if part) + "\n"

    def _head(self) -> Iterator[str]:
        how = f"{self.dtype}, quantization {self.quantization}, kernels {self.kernels}"
        yield f"{self.path} in {how}; {runs_words(self.runs)} of {self.steps} steps"
        yield from NOTES

    def _setup_lines(self, setup: SetupReport) -> Iterator[str]:
        yield setup.name
        yield from aligned([HEADINGS, *map(_cells, setup.rows)])
        for rank, memory in enumerate(setup.memory):
            yield (
                f"rank {rank}: {format_bytes(memory.resident)} resident, {format_bytes(memory.weights)} of weights, "
                f"{format_bytes(memory.kv_cache)} of KV cache, {format_bytes(self.bare_memory)} of a process that "
                f"imported torch: {_more_or_less(memory.beyond(self.bare_memory))}, "
                f"{percent(memory.share_beyond(self.bare_memory))} of weights and KV cache"
            )

    def _ratio_lines(self) -> Iterator[str]:
        for ratio in self.ratios:
            yield (
                f"{ratio.of} over {ratio.over}, {ratio.row}: {spread(ratio.speed_up, _times)}; the roofs' ratio "
                f"{spread(ratio.roof_ratio, _times)}; share {spread(ratio.share, percent)}"
            )

    def _limit_lines(self) -> Iterator[str]:
        for limit in self.limits:
            show = gigabytes if limit.kind == "read" else operations
            cores = f"{limit.cores} core{'s' * (limit.cores > 1)}"
            yield f"limit of {cores}, {limit.kind}: {spread(limit.rate, show)}, {limit.way}"


def row_name(phase: str, batch: int, context: int) -> str:
    """Return what a row is called."""
    return f"prefill {context}" if phase == "prefill" else f"decode {batch} x {context}"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row_name(row.phase, row.batch, row.context),
        str(row.num_steady or "unsteady"),
        spread(row.step_seconds, format_seconds),
        spread(row.tokens_per_second, lambda rate: f"{rate:.1f}"),
        format_bytes(row.cost.read_bytes),
        f"{format_count(row.cost.operations)}op",
        format_seconds(row.read_seconds.median),
        format_seconds(row.compute_seconds.median),
        spread(row.roof_share, percent),
        *("" if share is None else spread(share, percent) for share in (row.transfer_share, row.waiting_share)),
    )


def _more_or_less(size: int) -> str:
    return f"{format_bytes(abs(size))} {'less' if size < 0 else 'more'}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f} x"
