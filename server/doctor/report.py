"""Shows what checks find: a table for people, as it grows, or one JSON document."""

import os
import shutil
import sys
import textwrap
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from typing import TextIO

import msgspec

from engine.protocol.checks import CheckEvent, CheckResult, CheckStatus
from engine.protocol.config import EngineConfig

NAME_WIDTH = 18
SHOWN_SECONDS = 0.5  # a check that takes longer says how long
NARROWEST, WIDEST = 60, 120
SIGNS = {CheckStatus.OK: "✓", CheckStatus.WARNING: "!", CheckStatus.FAILURE: "✗", CheckStatus.SKIPPED: "·"}
PLAIN_SIGNS = {CheckStatus.OK: "+", CheckStatus.WARNING: "!", CheckStatus.FAILURE: "x", CheckStatus.SKIPPED: "-"}
GREEN, YELLOW, RED, DIM, BOLD = "32", "33", "31", "2", "1"
COLOURS = {
    CheckStatus.OK: GREEN,
    CheckStatus.WARNING: YELLOW,
    CheckStatus.FAILURE: RED,
    CheckStatus.SKIPPED: DIM,
}
ERASE_LINE = "\r\x1b[K"


class UnwritableError(Exception):
    """What is found can no longer be shown."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output: {error.strerror}")
        self.is_unread = isinstance(error, BrokenPipeError)  # whoever read it has seen enough


class Report(ABC):
    """Takes events of checks, and counts results."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._counts: Counter[CheckStatus] = Counter()
        self._began = time.perf_counter()

    def take(self, event: CheckEvent) -> None:
        """Take what a check tells."""
        if isinstance(event, CheckResult):
            self._counts[event.status] += 1
        self._show(event)

    def count(self, status: CheckStatus) -> int:
        """Return how many checks ended so."""
        return self._counts[status]

    @property
    def seconds(self) -> float:
        """Time since the beginning."""
        return time.perf_counter() - self._began

    def _write(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except OSError as error:
            raise UnwritableError(error) from error

    @abstractmethod
    def _show(self, event: CheckEvent) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Show the sum of it all."""


class JsonReport(Report):
    """One JSON document at the end."""

    def __init__(self, out: TextIO, engine: EngineConfig) -> None:
        super().__init__(out)
        self._engine = engine
        self._results: list[CheckResult] = []

    def _show(self, event: CheckEvent) -> None:
        if isinstance(event, CheckResult):
            self._results.append(event)

    def close(self) -> None:
        """Write the document."""
        checks = [{name: getattr(result, name) for name in result.__struct_fields__} for result in self._results]
        document = {
            "version": version("ryzanstein"),
            "model": self._engine.model,
            "tensor_parallel_size": self._engine.tensor_parallel_size,
            "checks": checks,
            "totals": {status.value: self.count(status) for status in CheckStatus},
            "seconds": self.seconds,
            "would_serve": not self.count(CheckStatus.FAILURE),
        }
        self._write(msgspec.json.format(msgspec.json.encode(document)).decode() + "\n")


class TableReport(Report):
    """A line or more a check, under the heading of its section. On a terminal the check that runs is shown too."""

    def __init__(self, out: TextIO, name: str, engine: EngineConfig) -> None:
        super().__init__(out)
        self._width = max(NARROWEST, min(WIDEST, shutil.get_terminal_size().columns))
        self._is_terminal = out.isatty()
        self._has_colours = self._is_terminal and has_colours(os.environ)
        self._is_unicode = can_write("".join(SIGNS.values()) + "→…", out)
        self._section = ""
        ranks = "1 rank" if engine.tensor_parallel_size == 1 else f"{engine.tensor_parallel_size} ranks"
        self._write(self._coloured(f"ryzanstein doctor: {name} on {ranks}", BOLD) + "\n")

    def _show(self, event: CheckEvent) -> None:
        if event.section != self._section:
            self._section = event.section
            self._write("\n" + self._coloured(event.section.capitalize(), BOLD) + "\n")
        if isinstance(event, CheckResult):
            erase = ERASE_LINE if self._is_terminal else ""
            self._write(erase + self._row(event))
        elif self._is_terminal:
            self._write(self._coloured(f"  {'…' if self._is_unicode else '.'} {event.name}", DIM))

    def _row(self, result: CheckResult) -> str:
        sign = (SIGNS if self._is_unicode else PLAIN_SIGNS)[result.status]
        took = f" ({result.seconds:.1f} s)" if result.seconds >= SHOWN_SECONDS else ""
        first, *rest = self._wrapped(result.detail + took)
        colour = COLOURS[result.status]
        lines = [f"  {self._coloured(sign, colour)} {result.name:<{NAME_WIDTH}}{self._toned(first, result.status)}"]
        lines += [" " * self._indent + self._toned(line, result.status) for line in rest]
        if result.hint:
            arrow = "→ " if self._is_unicode else "-> "
            head, *tail = self._wrapped(arrow + result.hint, " " * len(arrow))
            lines += [" " * self._indent + self._coloured(line, BOLD) for line in (head, *tail)]
        return "\n".join(lines) + "\n"

    @property
    def _indent(self) -> int:
        return 4 + NAME_WIDTH

    def _wrapped(self, text: str, subsequent_indent: str = "") -> list[str]:
        width = self._width - self._indent
        lines = textwrap.wrap(
            text, width, subsequent_indent=subsequent_indent, break_on_hyphens=False, break_long_words=False
        )
        return lines or [""]

    def _toned(self, text: str, status: CheckStatus) -> str:
        return text if status is CheckStatus.OK else self._coloured(text, COLOURS[status])

    def close(self) -> None:
        """Write the sums and the verdict."""
        counts = [_counted(self.count(status), status) for status in CheckStatus if self.count(status)]
        dot = " · " if self._is_unicode else ", "
        total = sum(self._counts.values())
        failures = self.count(CheckStatus.FAILURE)
        verdict = "Serving would fail." if failures else "Serving would start."
        self._write(f"\n{total} checks: {', '.join(counts)}{dot}{self.seconds:.1f} s\n")
        self._write(self._coloured(verdict, RED if failures else GREEN) + "\n")

    def _coloured(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._has_colours else text


def _counted(number: int, status: CheckStatus) -> str:
    plural = "s" if number > 1 and status in (CheckStatus.WARNING, CheckStatus.FAILURE) else ""
    return f"{number} {status.value}{plural}"


def has_colours(environment: Mapping[str, str]) -> bool:
    """Return whether a terminal is to show colours (no-color.org)."""
    return not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def can_write(text: str, out: TextIO) -> bool:
    """Return whether `out` can encode `text`."""
    try:
        text.encode(out.encoding or sys.getdefaultencoding())
    except UnicodeEncodeError:
        return False
    return True
