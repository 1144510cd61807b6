"""Whether the files of a distributed checkpoint hold the bytes that were written."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.checkpoint.checksum import file_checksum
from engine.checkpoint.metadata import CheckpointMetadata, FileMetadata
from engine.worker.host import num_cpus

CHECKSUM_THREADS = 4  # of a process; each computes faster than most disks read


def checksum_problem(directory: Path, file: FileMetadata, advance: Callable[[int], None] = lambda _: None) -> str:
    """Return what is wrong with a file whose checksum is not the metadata's; nothing if it is."""
    path = directory / file.name
    if not path.is_file():
        return f"{path}: is missing; metadata.json names it as a file of rank {file.rank}"
    size = path.stat().st_size
    if size != file.size:
        return f"{path}: has {size} bytes, but metadata.json says {file.size}"
    checksum = file_checksum(path, advance)
    if checksum != file.xxh3_128:
        return f"{path}: has checksum {checksum}, but metadata.json says {file.xxh3_128}: its bytes have changed"
    return ""


def checksum_problems(
    directory: Path, metadata: CheckpointMetadata, advance: Callable[[int], None] = lambda _: None
) -> Iterator[str]:
    """Yield which files of a distributed checkpoint are missing, or hold other bytes than were written.

    Several are read at once.

    Args:
        directory: of the checkpoint.
        metadata: what it holds.
        advance: is told of bytes that were read, from several threads; what it raises ends the reading.
    """
    if not metadata.files:
        return

    def problem_of(file: FileMetadata) -> str:
        try:
            return checksum_problem(directory, file, advance)
        except ValueError as error:  # it cannot be read; the others may be
            return str(error)

    with ThreadPoolExecutor(min(len(metadata.files), max(CHECKSUM_THREADS, num_cpus()))) as pool:
        yield from filter(None, pool.map(problem_of, metadata.files))
