"""The checks of `ryzanstein doctor`: what one is, what it finds, and how they are run, in the engine and in the server.

The engine's process writes events as lines of JSON; the server shows them, and those of its own checks, as they come.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

import msgspec


class CheckStatus(StrEnum):
    """What a check found."""

    OK = "ok"
    WARNING = "warning"  # serving works, but not as well as it could
    FAILURE = "failure"  # serving would fail
    SKIPPED = "skipped"  # nothing to check, or not without what another check misses


class CheckBegun(msgspec.Struct, frozen=True, tag="begun"):
    """A check runs now."""

    section: str
    name: str


class CheckResult(msgspec.Struct, frozen=True, tag="result"):
    """A check has ended."""

    section: str
    name: str
    status: CheckStatus
    detail: str
    hint: str
    seconds: float


CheckEvent = CheckBegun | CheckResult


@dataclass(frozen=True)
class Finding:
    """What a check found, in words; `hint` says what to do about it."""

    status: CheckStatus
    detail: str
    hint: str = ""


def ok(detail: str) -> Finding:
    """All is well; `detail` holds what was found."""
    return Finding(CheckStatus.OK, detail)


def warning(detail: str, hint: str = "") -> Finding:
    """Serving works, but not as well as it could."""
    return Finding(CheckStatus.WARNING, detail, hint)


def failure(detail: str, hint: str = "") -> Finding:
    """Serving would fail."""
    return Finding(CheckStatus.FAILURE, detail, hint)


def skipped(reason: str) -> Finding:
    """There is nothing to check."""
    return Finding(CheckStatus.SKIPPED, reason)


class MissingBasisError(Exception):
    """A check cannot run because of what another check tells; the message names that one."""


@dataclass(frozen=True)
class Check:
    """One check: `examine` finds out. A ValueError is a failure in its words, as it is in serving."""

    section: str
    name: str
    examine: Callable[[], Finding]

    def run(self) -> CheckResult:
        """Examine, and time it. Whatever happens in one check, the others must still be told."""
        began = time.perf_counter()
        try:
            found = self.examine()
        except MissingBasisError as error:
            found = skipped(f"not without {error}")
        except ValueError as error:
            found = failure(str(error))
        except Exception as error:
            found = failure(f"{type(error).__name__}: {error}")
        seconds = time.perf_counter() - began
        return CheckResult(self.section, self.name, found.status, found.detail, found.hint, seconds)


def run_checks(checks: Iterable[Check], emit: Callable[[CheckEvent], None]) -> None:
    """Run `checks` one after the other, telling `emit` when each begins and what it found."""
    for check in checks:
        emit(CheckBegun(check.section, check.name))
        emit(check.run())
