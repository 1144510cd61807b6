"""The limit of open files, in processes of their own."""

import subprocess
import sys

import pytest

NAME = "resource.RLIMIT_NOFILE"


def outcome(soft: int, hard: int, call: str) -> str:
    """Return what `call` leaves of these limits, or its error."""
    program = (
        "import resource\nfrom engine.protocol import open_files\n"
        f"resource.setrlimit({NAME}, ({soft}, {hard}))\n"
        f"try:\n    open_files.{call}()\n    print(*resource.getrlimit({NAME}))\n"
        "except ValueError as error:\n    print(error)\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(("soft", "hard"), [(64, 64), (64, 4000), (4000, 4000)])
def test_the_limit_is_raised_to_the_hard_one(soft: int, hard: int) -> None:
    assert outcome(soft, hard, "raise_open_files_limit") == f"{hard} {hard}"


def test_too_few_are_refused_with_the_number_that_is_needed() -> None:
    assert outcome(63, 63, "check_open_files") == "only 63 files may be open (ulimit -n); serving takes at least 64"
    assert outcome(64, 64, "check_open_files") == "64 64"
