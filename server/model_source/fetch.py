"""One file of a model on the hub, into the hub's own cache. A download that was interrupted goes on where it was.

The cache is laid out as huggingface_hub keeps it, so that every program which uses that library shares it. The library
itself begins a file anew each time, so files are written here, under a name of their own until they are whole; it then
finds them there and links them into the snapshot.
"""

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from huggingface_hub import hf_hub_download, hf_hub_url
from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported lazily

PART_SUFFIX = ".ryzanstein.incomplete"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Snapshot:
    """One version of a model, and where it is kept."""

    model: str
    commit: str
    token: str | None
    storage: Path  # of this model, in the hub's cache

    @property
    def directory(self) -> Path:
        """Where its files are, by their names."""
        return self.storage / "snapshots" / self.commit

    @property
    def blobs(self) -> Path:
        """Where their contents are."""
        return self.storage / "blobs"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a snapshot, as the hub lists it."""

    name: str
    size: int  # bytes
    blob: str  # its content's name in the cache: SHA-256 of large files, git's hash of small ones; "" if not told

    def bytes_here(self, snapshot: Snapshot) -> int:
        """Return how many of its bytes are in the cache."""
        for path in (snapshot.directory / self.name, snapshot.blobs / self.blob, part_path(snapshot, self)):
            try:
                return min(self.size, path.stat().st_size)
            except FileNotFoundError:
                continue
        return 0


def part_path(snapshot: Snapshot, file: RemoteFile) -> Path:
    """Return where a file is while it is not whole."""
    return snapshot.blobs / f"{file.blob}{PART_SUFFIX}"


def fetch(snapshot: Snapshot, file: RemoteFile) -> None:
    """Have a file in the cache, whole, and in the snapshot's directory.

    Raises:
        OSError: if it cannot be written, or what came is not what was announced.
        Exception: whatever the library raises when the hub cannot be reached, or refuses.
    """
    if (snapshot.directory / file.name).exists():
        return
    if file.blob and file.size <= MAX_HTTP_DOWNLOAD_SIZE:  # beyond it only the library's other protocol delivers
        _fetch_blob(snapshot, file)
    hf_hub_download(
        snapshot.model,
        file.name,
        revision=snapshot.commit,
        cache_dir=snapshot.storage.parent,
        token=snapshot.token,
    )


def _fetch_blob(snapshot: Snapshot, file: RemoteFile) -> None:
    blob, part = snapshot.blobs / file.blob, part_path(snapshot, file)
    if blob.exists():
        return
    snapshot.blobs.mkdir(parents=True, exist_ok=True)
    with _locked(part) as out:  # another service may be at the same file
        if blob.exists():  # and has brought it to its end meanwhile
            part.unlink(missing_ok=True)
            return
        _fetch_rest(snapshot, file, out)
        part.rename(blob)


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[IO[bytes]]:
    """Open a file that is not whole, when nobody else has it open: the one that is there then."""
    while True:
        with part.open("ab") as out:
            fcntl.flock(out, fcntl.LOCK_EX)
            if part.exists() and os.path.samestat(part.stat(), os.fstat(out.fileno())):
                yield out
                return


def _fetch_rest(snapshot: Snapshot, file: RemoteFile, out: IO[bytes]) -> None:
    """Append what is missing to `out`."""
    begun = out.seek(0, os.SEEK_END)  # another process may have added to it since it was opened
    if begun > file.size:
        out.truncate(0)
        begun = 0
    url = hf_hub_url(snapshot.model, file.name, revision=snapshot.commit)
    headers = build_hf_headers(token=snapshot.token)
    http_get(url, out, resume_size=begun, headers=headers, expected_size=file.size)  # type: ignore[arg-type]
    out.flush()
    os.fsync(out.fileno())
    if begun:  # by another process, which may have died with the machine: some of its bytes may be missing
        _check_content(file, Path(out.name))


def _check_content(file: RemoteFile, path: Path) -> None:
    if not _SHA256.fullmatch(file.blob):
        return
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != file.blob:
        path.unlink()
        raise OSError(f"{file.name}: what came is not what the hub announced; start again to fetch it anew")
