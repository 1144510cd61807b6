"""Where the C++ kernels lie, and how a library is known to be of these sources."""

import hashlib
from pathlib import Path

DIRECTORY = Path(__file__).parent
SOURCES = tuple(sorted((DIRECTORY / "cpu").glob("*.cpp")))
HEADERS = tuple(sorted((DIRECTORY / "cpu").glob("*.h")))


def source_hash() -> str:
    """Return a hash of all sources and headers, by name and content."""
    digest = hashlib.sha256()
    for path in (*SOURCES, *HEADERS):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def library_name(instruction_set: str) -> str:
    """Return the file name of the kernels that were compiled for an instruction set."""
    return f"kernels_{instruction_set}.so"
