"""What the doctor shows: a table that fits the terminal, or a JSON document."""

import io
import json
import re

import pytest

from engine.protocol.checks import CheckBegun, CheckEvent, CheckResult, CheckStatus
from engine.protocol.config import EngineConfig
from server.doctor.report import JsonReport, TableReport

LONG = "as many words as it takes to fill more than a line of even the widest terminal that anyone has, twice over " * 2
RESULTS = [
    CheckResult("service", "port", CheckStatus.OK, "8000 on 127.0.0.1 is free", "", 0.001),
    CheckResult("service", "sampling defaults", CheckStatus.WARNING, LONG, "say it in other words", 0.001),
    CheckResult("model", "tensors", CheckStatus.FAILURE, "tensor lm_head.weight is missing", "download it again", 2.0),
    CheckResult("ranks", "all-reduce", CheckStatus.SKIPPED, "one rank has nobody to wait for", "", 0.0),
]
EVENTS: list[CheckEvent] = [event for result in RESULTS for event in (CheckBegun(result.section, result.name), result)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(out: io.TextIOBase, events: list[CheckEvent] = EVENTS) -> str:
    assert isinstance(out, io.StringIO)
    report = TableReport(out, "name", EngineConfig(tensor_parallel_size=2))
    for event in events:
        report.take(event)
    report.close()
    return out.getvalue()


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_table_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = shown(io.StringIO()).splitlines()
    assert columns - 25 < max(map(len, lines)) <= columns


def test_each_check_is_a_line_under_its_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(io.StringIO(), [event for event in EVENTS if event.name != "sampling defaults"])
    assert re.sub(r"\d\.\d s\n", "_ s\n", text) == (
        "ryzanstein doctor: name on 2 ranks\n"
        "\n"
        "Service\n"
        "  ✓ port              8000 on 127.0.0.1 is free\n"
        "\n"
        "Model\n"
        "  ✗ tensors           tensor lm_head.weight is missing (2.0 s)\n"
        "                      → download it again\n"
        "\n"
        "Ranks\n"
        "  · all-reduce        one rank has nobody to wait for\n"
        "\n"
        "3 checks: 1 ok, 1 failure, 1 skipped · _ s\n"
        "Serving would fail.\n"
    )


def test_a_file_gets_neither_colours_nor_what_is_erased_again() -> None:
    text = shown(io.StringIO())
    assert "\x1b" not in text
    assert "\r" not in text


def test_a_terminal_gets_colours_and_the_check_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    text = shown(Terminal())
    assert "\x1b[2m  … port\x1b[0m\r\x1b[K  \x1b[32m✓\x1b[0m port" in text
    assert "\x1b[31m✗\x1b[0m" in text


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_color_and_dumb_terminals_are_respected(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert not re.search(r"\x1b\[\d+m", shown(Terminal()))


def test_an_ascii_terminal_gets_signs_that_it_has() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="")
    report = TableReport(out, "name", EngineConfig())
    for event in EVENTS:
        report.take(event)
    report.close()
    assert isinstance(out.buffer, io.BytesIO)
    text = out.buffer.getvalue().decode("ascii")
    assert "  x tensors" in text
    assert "-> download it again" in text
    assert "1 skipped, " in text


def test_the_json_document_holds_every_check_and_the_sums() -> None:
    out = io.StringIO()
    report = JsonReport(out, EngineConfig(model="somewhere"))
    for event in EVENTS:
        report.take(event)
    assert out.getvalue() == ""
    report.close()
    document = json.loads(out.getvalue())
    assert [check["name"] for check in document["checks"]] == [result.name for result in RESULTS]
    assert document["checks"][2] == {
        "section": "model",
        "name": "tensors",
        "status": "failure",
        "detail": "tensor lm_head.weight is missing",
        "hint": "download it again",
        "seconds": 2.0,
    }
    assert document["totals"] == {"ok": 1, "warning": 1, "failure": 1, "skipped": 1}
    assert document["would_serve"] is False
    assert document["model"] == "somewhere"
    assert set(document) == {
        "version", "model", "tensor_parallel_size", "checks", "totals", "seconds", "would_serve",
    }  # fmt: skip
