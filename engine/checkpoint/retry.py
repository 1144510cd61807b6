"""Reading from storage that sometimes fails for a moment: network file systems, disks that are busy recovering."""

import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

TRANSIENT_ERRORS = (
    errno.EIO,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EREMOTEIO,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
)
WAITS = (0.1, 0.3, 0.6)  # seconds before another try; the last failure counts
logger = logging.getLogger(__name__)


def read_bytes(path: Path) -> bytes:
    """Return what a small file holds.

    Raises:
        ValueError: naming the file, if it cannot be read.
    """
    return retrying(path, path.read_bytes)


def retrying(path: Path, operation: Callable[[], T]) -> T:
    """Return what `operation` returns, tried again some times while it fails as storage does that will recover.

    Args:
        path: the file that it reads.
        operation: may be repeated.

    Raises:
        ValueError: naming the file, if it fails otherwise, or for too long.
    """
    for wait in WAITS:
        try:
            return operation()
        except OSError as error:
            if error.errno not in TRANSIENT_ERRORS:
                raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
            logger.warning("%s: %s; trying again in %.1f s", path, error.strerror, wait)
            time.sleep(wait)
    try:
        return operation()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}, {len(WAITS) + 1} times") from error
