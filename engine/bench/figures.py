"""Figures that were measured several times, as reports hold and show them."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What was measured again and again: one value a run."""

    median: float
    min: float
    max: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        """Sum values up."""
        return cls(median=statistics.median(values), min=min(values), max=max(values), values=tuple(values))


def spread(figure: Figure, show: Callable[[float], str]) -> str:
    """Return "median (least to most)", or the one value that there is."""
    if len(figure.values) == 1:
        return show(figure.median)
    return f"{show(figure.median)} ({show(figure.min)} to {show(figure.max)})"


def gigabytes(rate: float) -> str:
    """Return bytes a second as people read them."""
    return f"{rate / 1e9:.2f} GB/s"


def percent(share: float) -> str:
    """Return a share of 1 as people read it."""
    return f"{100 * share:.1f}%"


def runs_words(runs: int) -> str:
    """Return how often figures were measured, and so what `spread` shows of them."""
    return "1 run" if runs == 1 else f"{runs} runs: median (least to most)"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines in which columns begin below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in lines]
