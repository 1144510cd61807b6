"""Where the C++ kernels lie, and how a library is known to be of these sources."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

DIRECTORY = Path(__file__).parent


def sources_in(directory: Path) -> tuple[Path, ...]:
    """Return the sources of the libraries in `directory`; none where the package was installed without them."""
    return tuple(sorted((directory / "cpu").glob("*.cpp")))


def headers_in(directory: Path) -> tuple[Path, ...]:
    """Return what the sources include."""
    return tuple(sorted((directory / "cpu").glob("*.h")))


SOURCES = sources_in(DIRECTORY)
HEADERS = headers_in(DIRECTORY)


def source_hash(paths: Iterable[Path] = (*SOURCES, *HEADERS)) -> str:
    """Return a hash of sources and headers, by name and content, in this order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def library_name(instruction_set: str) -> str:
    """Return the file name of the kernels that were compiled for an instruction set."""
    return f"kernels_{instruction_set}.so"
