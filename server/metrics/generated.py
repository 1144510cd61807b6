"""Files that are written from others: a command shows one, or puts it in its place."""

import argparse
import sys
from pathlib import Path


def write(program: str, description: str, text: str, arguments: list[str]) -> int:
    """Write `text` to standard output, or into the file that `arguments` name; return the exit code."""
    parser = argparse.ArgumentParser(prog=f"python {program}", description=description)
    parser.add_argument("--update", metavar="FILE", type=Path, help="write it into this file")
    path = parser.parse_args(arguments).update
    if path is None:
        sys.stdout.write(text)
    else:
        path.write_text(text, encoding="utf-8")
    return 0
