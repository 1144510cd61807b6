"""Prints what the tests cover of engine/ and server/; fails where it is too little. Run by `make coverage`."""

import json
import sys
import tempfile
from pathlib import Path

import coverage

LEAST = 90.0  # percent of all lines and branches
CUDA = "# pragma: cuda"  # lines that only run on a GPU


def main() -> int:
    """Print table, files below the limit, and what was left out; return the exit code."""
    measured = coverage.Coverage()
    measured.load()
    total = measured.report(show_missing=True, skip_covered=True, sort="cover")
    for name, percent in sorted(_percents(measured).items(), key=lambda item: item[1]):
        if percent < LEAST:
            print(f"below {LEAST:.0f}%: {name} {percent:.1f}%")
    print(f"left out: {_num_cuda_lines()} lines that need CUDA ({CUDA})")
    print(f"total: {total:.1f}% of lines and branches; at least {LEAST:.0f}% are asked for")
    return 0 if total >= LEAST else 1


def _percents(measured: coverage.Coverage) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coverage.json"
        measured.json_report(outfile=str(path))
        files = json.loads(path.read_text())["files"]
    return {name: entry["summary"]["percent_covered"] for name, entry in files.items()}


def _num_cuda_lines() -> int:
    measured = coverage.Coverage()
    measured.load()
    measured.clear_exclude()
    measured.exclude(CUDA)
    return sum(len(measured.analysis2(name)[2]) for name in measured.get_data().measured_files())


if __name__ == "__main__":
    sys.exit(main())
