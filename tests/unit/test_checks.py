"""What becomes of a check that passes, fails, or cannot run."""

from collections.abc import Callable

import pytest

from engine.protocol.checks import (
    Check,
    CheckBegun,
    CheckEvent,
    CheckResult,
    CheckStatus,
    Finding,
    MissingBasisError,
    failure,
    ok,
    run_checks,
    skipped,
    warning,
)
from engine.protocol.units import format_bytes, format_count, format_seconds


def result_of(error: Exception) -> CheckResult:
    def examine() -> Finding:
        raise error

    return Check("section", "name", examine).run()


@pytest.mark.parametrize("find", [ok, warning, failure, skipped])
def test_a_result_holds_what_was_found(find: Callable[[str], Finding]) -> None:
    found = find("detail")
    result = Check("section", "name", lambda: found).run()
    assert (result.status, result.detail, result.hint) == (found.status, "detail", "")
    assert result.seconds >= 0


def test_a_value_error_is_a_failure_in_its_own_words() -> None:
    result = result_of(ValueError("--port 1: cannot listen"))
    assert (result.status, result.detail) == (CheckStatus.FAILURE, "--port 1: cannot listen")


def test_any_other_error_is_a_failure_and_named() -> None:
    result = result_of(OSError(28, "No space left on device"))
    assert (result.status, result.detail) == (CheckStatus.FAILURE, "OSError: [Errno 28] No space left on device")


def test_a_check_that_lacks_what_another_tells_is_skipped() -> None:
    result = result_of(MissingBasisError("a usable config.json"))
    assert (result.status, result.detail) == (CheckStatus.SKIPPED, "not without a usable config.json")


def test_checks_run_in_order_and_none_stops_the_others() -> None:
    def fail() -> Finding:
        raise RuntimeError("broken")

    events: list[CheckEvent] = []
    run_checks([Check("a", "first", fail), Check("b", "second", lambda: ok("fine"))], events.append)
    assert [(type(event), event.name) for event in events] == [
        (CheckBegun, "first"),
        (CheckResult, "first"),
        (CheckBegun, "second"),
        (CheckResult, "second"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_bytes(1023), "1023 B"),
        (format_bytes(1536), "1.5 KiB"),
        (format_bytes(3 << 40), "3.0 TiB"),
        (format_count(9999), "9999"),
        (format_count(5_500_000), "5.5 M"),
        (format_count(2e13), "20.0 T"),
        (format_seconds(5e-8), "50 ns"),
        (format_seconds(4.1e-5), "41 µs"),
        (format_seconds(0.0012), "1.2 ms"),
        (format_seconds(3), "3.0 s"),
    ],
)
def test_quantities_are_written_as_people_read_them(text: str, expected: str) -> None:
    assert text == expected
