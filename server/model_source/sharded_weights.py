"""What the shard cache does for one service: give it an entry to map, or write one once the service is ready."""

import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from engine.protocol.commands import ShardCommand
from engine.protocol.config import EngineConfig
from engine.protocol.model_config import ModelConfig
from engine.protocol.model_directory import is_distributed
from server.model_source.config import ModelSourceConfig
from server.model_source.entry_lock import EntryLock
from server.model_source.shard_cache import CacheKey, ShardCache
from server.model_source.shard_writer import ShardWriter

SMALLEST_MODEL = 64 << 20  # bytes of weights; smaller ones are read in no time, and would only fill the folder
STOP_SECONDS = 2.5  # for the thread to end, before it is left to itself

logger = logging.getLogger(__name__)


def default_root() -> Path:
    """Return where entries are kept unless an option says otherwise. Raises RuntimeError where there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ryzanstein" / "shards"


@dataclass(frozen=True)
class Entry:
    """The entry that a start would map, there or not."""

    cache: ShardCache
    key: CacheKey
    name: str

    @property
    def directory(self) -> Path:
        """Where it is, or would be."""
        return self.cache.entry(self.name)

    @property
    def lock_path(self) -> Path:
        """The file that is locked for it."""
        return self.cache.lock_path(self.name)

    @property
    def is_there(self) -> bool:
        """Whether it can be mapped."""
        return is_distributed(self.directory)


def find_entry(directory: Path, engine: EngineConfig, model: ModelConfig, config: ModelSourceConfig) -> Entry | None:
    """Return the entry that a start from `directory` would map.

    None: it would map none, because that is switched off, the model is distributed already or small, or its weights
    cannot be found, which is the ranks' to tell.
    """
    if not config.shard_cache or is_distributed(directory):
        return None
    key = CacheKey(
        source=directory,
        tensor_parallel_size=engine.tensor_parallel_size,
        dtype=model.dtype if engine.dtype == "auto" else engine.dtype,
        stored_dtype=model.dtype,
        quantization=engine.quantization,
    )
    try:
        if key.weight_bytes < SMALLEST_MODEL:
            return None
        name = key.name
        root = default_root() if config.shard_cache_dir is None else Path(config.shard_cache_dir).expanduser()
    except (OSError, ValueError):
        return None
    except RuntimeError:  # a container's user often has no home
        logger.info("shard cache: not used: there is no home directory; --shard-cache-dir names another")
        return None
    return Entry(ShardCache(root.absolute(), config.shard_cache_size), key, name)


class Explanation(NamedTuple):
    """Why ranks could not start."""

    error: str
    is_cured: bool = False  # another start does not come upon it


class ShardedWeights:
    """Of one service. `directory` is the entry that the ranks map, or None: they read the model's own files.

    Args:
        entry: what to map, or else to write; None: do nothing.
    """

    def __init__(self, entry: Entry | None) -> None:
        self.directory: Path | None = None
        self._entry = entry
        self._use: EntryLock | None = None  # held while the service maps the entry
        self._writer = ShardWriter()
        self._thread: threading.Thread | None = None
        try:
            self._open()
        except OSError as error:
            logger.info("shard cache: not used: %s: %s", error.filename, error.strerror)
            self._entry = None

    def _open(self) -> None:
        """Use the entry if it is there. Raises OSError if the folder can neither be written nor has it."""
        entry = self._entry
        if entry is None:
            return
        try:
            entry.cache.root.mkdir(parents=True, exist_ok=True)
            lock = EntryLock.try_shared(entry.lock_path)
        except OSError:
            if not entry.is_there:
                raise
            self.directory = entry.directory  # nobody can write there, so nobody removes it
            return
        if lock is not None and entry.is_there:
            lock.touch()
            self._use, self.directory = lock, entry.directory
        elif lock is not None:
            lock.close()

    def start_writing(self) -> None:
        """Write the entry beside the service, if it is not there; remove what others left unfinished."""
        if self._entry is not None:
            self._thread = threading.Thread(target=self._tidy_and_write, args=(self._entry,), daemon=True)
            self._thread.start()

    def explain(self, error: str) -> Explanation:
        """Say more of an error of the ranks, if an entry that they could not read explains it; the entry is removed."""
        if self._entry is None or self.directory is None or str(self.directory) not in error:
            return Explanation(error)
        try:
            self._entry.cache.remove(self._entry.name)
        except OSError as problem:
            where = f"of the shard cache, where it cannot be removed from here: {problem.strerror}"
            return Explanation(f"{error}; it is {where}")
        return Explanation(f"{error}; it was of the shard cache, and is removed: start again", is_cured=True)

    def close(self) -> None:
        """Stop writing, and leave the entry to others."""
        self._writer.stop()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)
        if self._use is not None:
            self._use.close()
            self._use = None

    def _tidy_and_write(self, entry: Entry) -> None:
        try:
            entry.cache.sweep()
            if self.directory is None:
                self._write_alone(entry)
        except OSError as error:
            logger.info("shard cache: %s: %s", error.filename or entry.cache.root, error.strerror)
        except ValueError as error:
            logger.info("shard cache: %s is not kept: %s", entry.key.source, error)

    def _write_alone(self, entry: Entry) -> None:
        """Write the entry, unless another service does."""
        lock = EntryLock.try_exclusive(entry.lock_path)
        if lock is None:
            return
        try:
            if not entry.is_there:
                if entry.directory.is_dir():  # what is left of an entry that others have tidied up
                    entry.cache.remove(entry.name)
                entry.cache.make_room(entry.key.entry_bytes)
                self._write(entry, lock)
        finally:
            lock.close()

    def _write(self, entry: Entry, lock: EntryLock) -> None:
        began = time.monotonic()
        logger.info("shard cache: writing %s beside the service", entry.directory)
        command = ShardCommand(
            source=str(entry.key.source),
            destination=str(entry.directory),
            tensor_parallel_size=entry.key.tensor_parallel_size,
            dtype=entry.key.dtype,
            quantization=entry.key.quantization,
            progress=False,
        )
        problem = self._writer.run(command, (lock.fileno(),))
        entry.cache.remove_unfinished(entry.name)
        if self._writer.is_stopped:
            return
        if problem is not None:
            raise ValueError(problem)
        lock.touch()
        seconds = time.monotonic() - began
        logger.info("shard cache: wrote %s in %.1f s; the next start maps it", entry.directory, seconds)
