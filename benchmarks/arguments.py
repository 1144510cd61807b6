"""Types of the benchmarks' options."""

import argparse


def count(word: str) -> int:
    """Return a number of at least 1."""
    if (number := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number
