"""What `ryzanstein bench collectives` found, as a table for people and as JSON for scripts."""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from engine.bench.figures import Figure, aligned, gigabytes, runs_words, spread
from engine.protocol.units import format_bytes

HEADING = ("", "tokens", "bytes", "over", "a call", "transfer", "waiting", "rate", "a copy", "copies")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One operation of one size. Seconds are of one call of the slowest rank, or of each rank of each run."""

    carrier: str
    operation: str
    num_tokens: int
    num_bytes: int  # that each rank has; an all-gather returns as many times these as there are ranks
    seconds: Figure
    transfer_seconds: Figure | None  # of each rank, without the waiting. None where that is not known
    waiting_seconds: Figure | None  # of each rank, for slower ones
    rate: Figure  # num_bytes a second
    copy_seconds: Figure  # of a plain copy of as many bytes, by all ranks at once
    copies: Figure  # how many such copies take as long as a call


@dataclass(frozen=True, kw_only=True)
class CollectivesBenchmark:
    """The whole document."""

    tensor_parallel_size: int
    runs: int
    collectives: tuple[Collective, ...]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """Return it as one JSON document."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode() + "\n"

    def to_table(self) -> str:
        """Return it as people read it."""
        notes = ["", *(f"note: {note}" for note in self.notes)] if self.notes else []
        return "\n".join([*self._head(), "", *aligned([HEADING, *self._rows()]), *notes]) + "\n"

    def _head(self) -> Iterator[str]:
        ranks = f"{self.tensor_parallel_size} ranks with a thread each"
        yield f"{ranks}; [tokens, 2048] in bfloat16; {runs_words(self.runs)}"
        yield "times of the slowest rank; transfer and waiting, and a plain copy by all ranks at once, in the same run"

    def _rows(self) -> Iterator[tuple[str, ...]]:
        operations = list(dict.fromkeys(item.operation for item in self.collectives))
        ordered = sorted(self.collectives, key=lambda item: (operations.index(item.operation), item.num_tokens))
        for item in ordered:
            yield (
                item.operation,
                str(item.num_tokens),
                format_bytes(item.num_bytes),
                item.carrier,
                spread(item.seconds, _time),
                _median(item.transfer_seconds),
                _median(item.waiting_seconds),
                gigabytes(item.rate.median),
                _time(item.copy_seconds.median),
                f"{item.copies.median:.1f}",
            )


def _median(figure: Figure | None) -> str:
    return "" if figure is None else _time(figure.median)


def _time(seconds: float) -> str:
    """Return a time with the same digits in a column of short and long ones."""
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
