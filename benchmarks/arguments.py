"""Types of the benchmarks' options."""

import argparse
import math


def count(word: str) -> int:
    """Return a number of at least 1."""
    if (number := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def seconds(word: str) -> float:
    """Return a time above 0 that comes to an end."""
    if not 0 < (number := float(word)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, not {number:g}")
    return number
