"""What becomes of a process's log, warnings and unhandled exceptions as JSON."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.service_process import ROOT

BEGIN = """
import gc, logging, sys, threading, warnings
from engine.protocol.logs import fields_of, write_json
write_json("info", process="rank", rank=3)
logger = logging.getLogger("engine.some")
"""


def written_by(program: str) -> tuple[int, list[dict[str, Any]]]:
    """Run a program after `BEGIN`; return its exit code, and each line of its standard error."""
    result = subprocess.run(
        [sys.executable, "-P", "-c", BEGIN + program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    return result.returncode, [json.loads(line) for line in result.stderr.splitlines()]


def test_what_is_less_important_than_the_level_is_not_written() -> None:
    _, (line,) = written_by("logger.debug('a'); logger.info('b %s', 1)")
    assert (line["message"], line["logger"], line["level"]) == ("b 1", "engine.some", "INFO")


def test_a_record_has_the_process_fields_and_its_own() -> None:
    _, (line,) = written_by("logger.info('a', extra=fields_of(path='/x', odd={1}))")
    assert (line["process"], line["rank"], line["path"], line["odd"]) == ("rank", 3, "/x", "{1}")


@pytest.mark.parametrize("text", ["two\\nlines", "\\x00 \\udc80 é 漢", '"quoted"'])
def test_any_text_stays_in_one_line(text: str) -> None:
    _, (line,) = written_by(f"logger.info({text!r}.encode().decode('unicode_escape'))")
    assert "\n" not in json.dumps(line["message"])


def test_a_logged_exception_is_a_field() -> None:
    _, (line,) = written_by("try:\n    1 / 0\nexcept ZeroDivisionError:\n    logger.exception('oh')")
    assert line["message"] == "oh"
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ZeroDivisionError: division by zero")


def test_an_exception_that_nobody_catches_is_a_record_and_still_ends_the_process() -> None:
    code, (line,) = written_by("1 / 0")
    assert code == 1
    assert (line["level"], line["message"]) == ("CRITICAL", "ZeroDivisionError: division by zero")
    assert "Traceback" in line["exception"]


def test_an_exception_of_a_thread_is_a_record() -> None:
    _, (line,) = written_by("threading.Thread(target=lambda: 1 / 0, name='t').start()")
    assert line["message"] == "in thread t: division by zero"


def test_an_exception_of_a_finalizer_is_a_record() -> None:
    _, (line,) = written_by("class A:\n    def __del__(self): 1 / 0\nA()")
    assert "ZeroDivisionError" in line["exception"]


def test_a_warning_is_a_record() -> None:
    _, (line,) = written_by("warnings.warn('old')")
    assert (line["logger"], line["level"]) == ("py.warnings", "WARNING")
    assert "old" in line["message"]
