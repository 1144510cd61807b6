"""Small file systems, for what happens when they are full or read-only."""

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

RELEASE_SECONDS = 30.0  # in which processes that have read from it let go of their files


@contextlib.contextmanager
def mounted_disk(path: Path, size: str) -> Iterator[Path]:
    """Mount a file system of `size`, such as 1m, at a new directory; skip the test where that is not allowed."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounts are not allowed here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        deadline = time.monotonic() + RELEASE_SECONDS
        while subprocess.run(["umount", path], check=False, stderr=subprocess.DEVNULL).returncode:
            assert time.monotonic() < deadline, f"{path} is in use"
            time.sleep(0.05)
