"""Models kept split as they are served, so that a start only maps files.

~/.cache/ryzanstein/shards/
    org--name-tp2-bfloat16-0123456789ab/    an entry: a distributed checkpoint, whole from the moment it is there
    .org--name-tp2-bfloat16-0123456789ab.lock
    .org--name-tp2-bfloat16-0123456789ab.tmp-…    one that is being written or removed, or was when a machine died
"""

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from engine.protocol.model_directory import CONFIG_FILE, is_distributed
from engine.protocol.units import format_bytes
from server.model_source.entry_lock import EntryLock
from server.model_source.model_files import weight_files

CACHE_VERSION = 1  # changes with what entries hold
LEAST_FREE = 0.1  # of the disk, which is left to others
PADDING = 1.02  # an entry's size over its weights': padding, and tensors that every rank holds
QUANTIZED_PADDING = 1.1  # likewise where matrices are int8: scales too, and an embedding that stays as it is
ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_ENTRY = re.compile(r"[\w.-]+-tp\d+-(?:float32|bfloat16|float16)(?:-int8)?-[0-9a-f]{12}")
_HUB_FOLDER = re.compile(r"models--(.+)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """What an entry is of: one version of a Hugging Face directory, split for some ranks, in some type."""

    source: Path
    tensor_parallel_size: int
    dtype: str
    stored_dtype: str  # of most weights in the source
    quantization: str = "none"  # of the matrices, as `--quantization` has it

    @property
    def weight_bytes(self) -> int:
        """The size of the source's weights.

        Raises:
            OSError: if a file is not there.
            ValueError: if the source does not say which files hold them.
        """
        return sum((self.source / name).stat().st_size for name in weight_files(self.source))

    @property
    def entry_bytes(self) -> int:
        """About the size of the entry. Raises what `weight_bytes` raises."""
        padding = PADDING if self.quantization == "none" else QUANTIZED_PADDING
        return int(self.weight_bytes * padding * ITEM_SIZES[self._matrix_dtype] / ITEM_SIZES[self.stored_dtype])

    @property
    def name(self) -> str:
        """The entry's name. Raises what `weight_bytes` raises."""
        files = [(name, (self.source / name).stat()) for name in (CONFIG_FILE, *weight_files(self.source))]
        identity = [
            CACHE_VERSION,
            str(self.source.resolve()),
            [(name, status.st_size, status.st_mtime_ns) for name, status in files],
        ]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
        return f"{self._label()}-tp{self.tensor_parallel_size}-{self._stored_as}-{digest}"

    @property
    def _matrix_dtype(self) -> str:
        return self.dtype if self.quantization == "none" else self.quantization

    @property
    def _stored_as(self) -> str:
        return self.dtype if self.quantization == "none" else f"{self.dtype}-{self.quantization}"

    def _label(self) -> str:
        """Return a name for people: the directory's, or the hub's, whose directories are called by hashes."""
        source = self.source.resolve()
        names = [match[1] for part in source.parts[-3:] if (match := _HUB_FOLDER.fullmatch(part))]
        label = re.sub(r"[^\w.-]", "_", (names or [source.name])[-1], flags=re.ASCII)
        return label.lstrip(".")[:100] or "model"


class ShardCache:
    """The folder of entries.

    Args:
        root: the folder.
        max_bytes: most that all entries may take.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root = root
        self._max_bytes = max_bytes

    def entry(self, name: str) -> Path:
        """Return where an entry is, or would be."""
        return self.root / name

    def lock_path(self, name: str) -> Path:
        """Return the file that is locked for an entry."""
        return self.root / f".{name}.lock"

    def make_room(self, size: int) -> None:
        """Remove what was not used for longest, and is not in use, until `size` more bytes have room.

        Raises:
            ValueError: if they cannot have it; nothing is removed then.
            OSError: if something cannot be removed.
        """
        if size > self._max_bytes:
            limit = format_bytes(self._max_bytes)
            raise ValueError(f"{format_bytes(size)} are more than --shard-cache-size, {limit}")
        sizes = {name: _size_of(self.entry(name)) for name in self._entries()}
        disk = shutil.disk_usage(self.root)
        surplus = sum(sizes.values()) + size - self._max_bytes
        shortage = int(size + LEAST_FREE * disk.total) - disk.free
        self._remove_oldest(sizes, max(surplus, shortage), is_disk=shortage >= surplus)

    def _remove_oldest(self, sizes: dict[str, int], missing: int, *, is_disk: bool) -> None:
        """Remove entries that nobody uses, of at least `missing` bytes together."""
        victims: dict[str, EntryLock] = {}
        try:
            for name in self._entries():
                if sum(sizes[victim] for victim in victims) >= missing:
                    break
                lock = EntryLock.try_exclusive(self.lock_path(name))
                if lock is not None:
                    victims[name] = lock
            if sum(sizes[victim] for victim in victims) < missing:
                raise ValueError(
                    f"less than {LEAST_FREE:.0%} of the disk would be left free" if is_disk else "all others are in use"
                )
            for name in victims:
                self.remove(name)
                logger.info("shard cache: removed %s, which was not used for longest", name)
        finally:
            for lock in victims.values():
                lock.close()

    def remove(self, name: str) -> None:
        """Remove an entry, so that there is none or a whole one at any moment. Whoever has it mapped keeps it.

        Raises:
            OSError: if it cannot be removed.
        """
        removed = self.root / f".{name}.tmp-removed-{os.getpid()}"
        self.entry(name).rename(removed)
        shutil.rmtree(removed)

    def remove_unfinished(self, name: str) -> None:
        """Remove what was left of writing or removing an entry. The caller holds its lock."""
        for path in self.root.glob(f".{name}.tmp-*"):
            shutil.rmtree(path, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what processes that are gone have left.

        Raises:
            OSError: if the folder cannot be read.
        """
        unfinished = {path.name[1:].partition(".tmp-")[0] for path in self.root.glob(".*.tmp-*")}
        for name in unfinished:
            lock = EntryLock.try_exclusive(self.lock_path(name)) if _ENTRY.fullmatch(name) else None
            if lock is not None:
                self.remove_unfinished(name)
                lock.close()

    def _entries(self) -> list[str]:
        """Return the names of all entries, those first that were not used for longest.

        What has no lock file was put there by somebody else.
        """
        names = [path.name for path in self.root.iterdir() if _ENTRY.fullmatch(path.name) and is_distributed(path)]
        used = {name: self.lock_path(name).stat().st_mtime_ns for name in names if self.lock_path(name).is_file()}
        return sorted(used, key=lambda name: (used[name], name))


def _size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())
