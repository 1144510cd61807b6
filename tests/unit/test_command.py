"""How `python -m engine.… COMMAND` ends: which errors have which exit code."""

import subprocess
import sys

import pytest

COMMAND = """
import sys
from engine.command.main import run_command
from engine.protocol.errors import TransientError, file_error

def fail(command, stop):
    raise eval(sys.argv[1])

sys.exit(run_command(["fail", "{}"], {"fail": dict}, fail))
"""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("ValueError('out: is there already')", 2),
        ("file_error('out: is full', OSError(28, ''))", 2),
        ("file_error('out: cannot be written', OSError(5, ''))", 1),
        ("TransientError('out: later')", 1),
    ],
)
def test_what_another_try_may_cure_is_no_mistake(error: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", COMMAND, error], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("ryzanstein: error: out: ")
    assert done.stderr.count("\n") == 1
