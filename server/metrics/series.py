"""Series that one thread counts in and reads, the event loop's: adding to one takes no lock, and next to no time."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate, product
from typing import Generic, Protocol, TypeVar

from engine.protocol.messages import HistogramDelta
from server.metrics.table import Metric

BUCKET, SUM, COUNT = "_bucket", "_sum", "_count"


class Series(Protocol):
    """One series of the table: for a histogram those of all its buckets."""

    def read(self) -> tuple[float, ...]:
        """Return the numbers to show now, one a line."""
        ...


class Value:
    """A series of a counter or a gauge."""

    __slots__ = ("_function", "_value")

    def __init__(self) -> None:
        self._value = 0.0
        self._function: Callable[[], float] | None = None

    def inc(self, amount: float = 1.0) -> None:
        """Add `amount`."""
        self._value += amount

    def dec(self, amount: float = 1.0) -> None:
        """Take `amount` away, from a gauge."""
        self._value -= amount

    def set(self, value: float) -> None:
        """Set a gauge."""
        self._value = value

    def set_function(self, function: Callable[[], float]) -> None:
        """Have the value asked for when it is shown."""
        self._function = function

    def read(self) -> tuple[float, ...]:
        """Return the value."""
        return (self._value if self._function is None else self._function(),)


class Distribution:
    """A series of a histogram."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add(self, delta: HistogramDelta) -> None:
        """Add what was counted elsewhere over the same bounds."""
        self._counts = [old + new for old, new in zip(self._counts, delta.counts, strict=True)]
        self._sum += delta.sum

    def read(self) -> tuple[float, ...]:
        """Return how many values were at most each bound, and any; how many there were; and their sum."""
        cumulative = list(accumulate(self._counts))
        return (*cumulative, cumulative[-1], self._sum)


S_co = TypeVar("S_co", bound=Series, covariant=True)


class Family(Generic[S_co]):
    """All series of one line of the table; those whose labels' values are all fixed are there from the start."""

    def __init__(self, metric: Metric, new: Callable[[], S_co]) -> None:
        self.metric = metric
        self._new = new
        self._series: dict[tuple[str, ...], S_co] = {}
        for values in product(*(label.values for label in metric.labels)):
            self.labels(*values)

    def labels(self, *values: str) -> S_co:
        """Return the series with these values of the labels, in the table's order."""
        series = self._series.get(values)
        if series is None:
            if len(values) != len(self.metric.labels):
                raise ValueError(f"{self.metric.name} has {len(self.metric.labels)} labels, not {len(values)}")
            series = self._series[values] = self._new()
        return series

    def clear(self) -> None:
        """Forget all series."""
        self._series.clear()

    def __iter__(self) -> Iterator[tuple[tuple[str, ...], S_co]]:
        return iter(self._series.items())
