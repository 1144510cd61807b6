"""What `ryzanstein bench limits` found, as a table for people and as JSON for scripts."""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from engine.bench.figures import Figure, aligned, gigabytes, runs_words, spread

READ = "read"


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What so many cores do at once."""

    kind: str  # "read", or the type that matrices are multiplied in
    cores: int
    way: str  # in which it is fastest, of those that were tried
    rate: Figure  # bytes, or operations, a second


@dataclass(frozen=True, kw_only=True)
class LimitsBenchmark:
    """The whole document."""

    num_cpus: int
    kernels: str  # whose read loop and products were tried beside torch's
    runs: int
    limits: tuple[Limit, ...]

    def to_json(self) -> str:
        """Return it as one JSON document."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode() + "\n"

    def to_table(self) -> str:
        """Return it as people read it."""
        return "\n".join([*self._head(), "", *aligned([*self._rows()])]) + "\n"

    def _head(self) -> Iterator[str]:
        yield f"{self.num_cpus} cores that this process may keep busy; kernels {self.kernels}; {runs_words(self.runs)}"

    def _rows(self) -> Iterator[tuple[str, ...]]:
        counts = sorted({limit.cores for limit in self.limits})
        yield ("", *(f"{count} core{'s' * (count > 1)}" for count in counts))
        for kind in dict.fromkeys(limit.kind for limit in self.limits):
            limits = sorted((limit for limit in self.limits if limit.kind == kind), key=lambda limit: limit.cores)
            yield ("read memory" if kind == READ else f"multiply {kind}", *(_cell(limit) for limit in limits))


def _cell(limit: Limit) -> str:
    show = gigabytes if limit.kind == READ else operations
    return f"{spread(limit.rate, show)}, {limit.way}"


def operations(rate: float) -> str:
    """Return operations a second as people read them."""
    return f"{rate / 1e9:.0f} Gop/s"
