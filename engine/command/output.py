"""What a command says."""

import io
import os
import sys


def say(text: str) -> None:
    """Write to standard output, in whatever encoding it has.

    Raises:
        ValueError: if it takes nothing more.
        BrokenPipeError: if nobody reads it.
    """
    if not isinstance(sys.stdout, io.TextIOWrapper):
        raise ValueError("standard output is closed")
    sys.stdout.reconfigure(errors="replace")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)  # else Python would try again at its end, and complain
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        if isinstance(error, BrokenPipeError):
            raise
        raise ValueError(f"standard output: {error.strerror}") from error


def complain(error: Exception) -> None:
    """Write an error to standard error, in one line."""
    sys.stderr.write(f"ryzanstein: error: {' '.join(str(error).split())}\n")
