"""`python -m server.model_source.hub_process`: reads a request from standard input, and writes events, a line each.

A process of its own, since the threads of a download cannot be told to end: this one can be killed. It ends by itself
when standard input is closed.
"""

import os
import re
import shutil
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import msgspec
from huggingface_hub import HfApi
from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name

from engine.protocol.logs import write_json
from engine.protocol.units import format_bytes
from server.model_source.fetch import RemoteFile, Snapshot, fetch
from server.model_source.hub_errors import describe, is_transient, is_unreachable
from server.model_source.hub_messages import (
    HubDescribed,
    HubDone,
    HubEvent,
    HubFailed,
    HubProgress,
    HubRequest,
    HubTask,
    HubTexts,
    HubWarning,
)
from server.model_source.model_files import INDEX_FILE, SINGLE_FILE, is_whole, small_files, weight_files

ANSWER_SECONDS = 10.0  # in which the hub says what it has
PARALLEL_FILES = 8
PROGRESS_SECONDS = 0.5
DEFAULT_REVISION = "main"
_HASH = re.compile(r"[0-9a-f]+")
# How shards are usually called. Which they are stands in a file that is not here yet; `weights_rank0.safetensors` too.
SHARDS = "*[-k]*[0-9].safetensors"


class Emit(Protocol):
    """Tells the service an event."""

    def __call__(self, event: HubEvent) -> None:
        """Write `event`."""


class _Hub:
    """One request, and how to answer it."""

    def __init__(self, request: HubRequest, emit: Emit) -> None:
        self._request = request
        self._emit = emit
        self.folder = _cache(request)
        self._storage = self.folder / repo_folder_name(repo_id=request.model, repo_type="model")

    def answer(self) -> HubEvent:
        """Do what is asked; return the last event."""
        if self._request.task is HubTask.FIND or self._request.offline or HF_HUB_OFFLINE:
            return self._find()
        try:
            snapshot, files = self._list()
        except Exception as error:  # of the network, in many kinds
            return self._fall_back(error)
        if self._request.task is HubTask.DESCRIBE:
            return self._describe(files)
        return self._download(snapshot, files)

    def _list(self) -> tuple[Snapshot, dict[str, RemoteFile]]:
        """Ask the hub which files there are."""
        revision = self._request.revision or DEFAULT_REVISION
        info = HfApi(token=self._request.token).model_info(
            self._request.model, revision=revision, files_metadata=True, timeout=ANSWER_SECONDS
        )
        assert info.sha is not None
        files = {}
        for sibling in info.siblings or ():
            blob = sibling.blob_id if sibling.lfs is None else sibling.lfs.sha256
            if not _HASH.fullmatch(f"{info.sha}{blob or ''}"):  # they become names of files
                raise ValueError(f"model: {ENDPOINT} does not speak as the hub does")
            files[sibling.rfilename] = RemoteFile(sibling.rfilename, sibling.size or 0, blob or "")
        return Snapshot(self._request.model, info.sha, self._request.token, self._storage), files

    def _describe(self, files: dict[str, RemoteFile]) -> HubEvent:
        names = self._small_files(files)
        is_single = SINGLE_FILE in files and INDEX_FILE not in names
        weights = [SINGLE_FILE] if is_single else [name for name in files if fnmatchcase(name, SHARDS)]
        size = sum(files[name].size for name in (*names, *weights))
        return HubDescribed(ENDPOINT, size, len(names) + len(weights))

    def _small_files(self, files: Iterable[str]) -> list[str]:
        try:
            return small_files(files)
        except ValueError as error:
            raise ValueError(f"model: {self._request.model} on the hub, {ENDPOINT}: {error}") from error

    def _download(self, snapshot: Snapshot, files: dict[str, RemoteFile]) -> HubEvent:
        self._fetch_all(snapshot, [files[name] for name in self._small_files(files)])
        self._emit(HubTexts(str(snapshot.directory)))
        weights = [self._remote(files, name) for name in weight_files(snapshot.directory)]
        self._check_room(snapshot, weights)
        watching = _Progress(snapshot, weights, self._emit)
        self._fetch_all(snapshot, weights)
        watching.end()
        self._note_revision(snapshot)
        return HubDone(str(snapshot.directory))

    def _remote(self, files: dict[str, RemoteFile], name: str) -> RemoteFile:
        if name not in files:
            raise ValueError(
                f"model: {self._request.model} on the hub, {ENDPOINT}: it names {name}, which is not there"
            )
        return files[name]

    def _check_room(self, snapshot: Snapshot, files: Sequence[RemoteFile]) -> None:
        missing = sum(file.size - file.bytes_here(snapshot) for file in files)
        free = shutil.disk_usage(self._storage).free
        if missing > free:
            raise ValueError(
                f"model: {self.folder}: {format_bytes(missing)} of {self._request.model} are to be downloaded, and "
                f"{format_bytes(free)} are free (--download-dir, HF_HOME)"
            )

    def _fetch_all(self, snapshot: Snapshot, files: Sequence[RemoteFile]) -> None:
        pool = ThreadPoolExecutor(PARALLEL_FILES)
        running = [pool.submit(fetch, snapshot, file) for file in files]
        done, _ = wait(running, return_when=FIRST_EXCEPTION)
        pool.shutdown(wait=False, cancel_futures=True)
        for future in done:
            error = future.exception()
            if isinstance(error, Exception):
                raise _FetchError(error)

    def _note_revision(self, snapshot: Snapshot) -> None:
        """Note which version a branch or tag is, for a start without the hub. Only now: it finds all that it needs."""
        revision = self._request.revision or DEFAULT_REVISION
        path = self._storage / "refs" / revision
        if revision == snapshot.commit or (path.is_file() and path.read_text() == snapshot.commit):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}.incomplete")
        new.write_text(snapshot.commit)
        new.rename(path)

    def _fall_back(self, error: Exception) -> HubEvent:
        """Take what was downloaded before, if that is the whole model."""
        reason = describe(error, self._request, str(self.folder))
        if self._request.task is HubTask.DESCRIBE or self._here() is None:
            besides = ", and the model was not downloaded before" if is_unreachable(error) else ""
            return HubFailed(reason + besides, is_transient=is_transient(error))
        self._emit(HubWarning(f"{reason}: {self._request.model} is served as it was downloaded before"))
        return self._find()

    def _find(self) -> HubEvent:
        directory = self._here()
        if directory is None:
            revision = f" in revision {self._request.revision}" if self._request.revision else ""
            return HubFailed(
                f"model: {self._request.model} is no directory, and not in the cache of the hub{revision}, "
                f"{self.folder}; --offline (or HF_HUB_OFFLINE) forbids to download it",
                is_absent=True,
            )
        self._emit(HubTexts(str(directory)))
        return HubDone(str(directory))

    def _here(self) -> Path | None:
        """Return the directory of the whole model in the cache, or None."""
        revision = self._request.revision or DEFAULT_REVISION
        note = self._storage / "refs" / revision
        commit = note.read_text() if note.is_file() else revision
        directory = self._storage / "snapshots" / commit
        return directory if is_whole(directory) else None


class _FetchError(Exception):
    """A file did not come. Its cause says why."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Progress:
    """Tells, from a thread of its own, how many bytes are here, if not all are from the beginning."""

    def __init__(self, snapshot: Snapshot, files: Sequence[RemoteFile], emit: Emit) -> None:
        self._snapshot = snapshot
        self._files = files
        self._emit = emit
        self._total = sum(file.size for file in files)
        self._is_needed = self._done() < self._total
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if self._is_needed:
            self._thread.start()

    def _done(self) -> int:
        return sum(file.bytes_here(self._snapshot) for file in self._files)

    def _tell(self) -> None:
        self._emit(HubProgress(self._done(), self._total, len(self._files)))

    def _run(self) -> None:
        self._tell()
        while not self._ended.wait(PROGRESS_SECONDS):
            self._tell()

    def end(self) -> None:
        """Tell for the last time."""
        self._ended.set()
        if self._is_needed:
            self._thread.join()
            self._tell()


def main() -> None:
    """Answer one request, and end without waiting for threads."""
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=HubRequest)
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    lock = threading.Lock()
    events = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries' words are no events
    if request.is_json_log:
        write_json("warning", process="download")  # as much as libraries write where nobody asks them

    def emit(event: HubEvent) -> None:
        with lock:
            events.write(msgspec.json.encode(event) + b"\n")

    emit(_last_event(request, emit))
    os._exit(0)


def _cache(request: HubRequest) -> Path:
    """Return the folder of all models.

    Raises:
        ValueError: if it is in a home that this user does not have.
    """
    try:
        return Path(request.download_dir or HF_HUB_CACHE).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(
            "model: this user has no home for downloaded models; give --download-dir, or HF_HOME"
        ) from error


def _last_event(request: HubRequest, emit: Emit) -> HubEvent:
    try:
        return _Hub(request, emit).answer()
    except HFValidationError as error:
        return HubFailed(describe(error, request, ""))
    except ValueError as error:
        return HubFailed(str(error))
    except _FetchError as error:
        return HubFailed(describe(error.cause, request, str(_cache(request))), is_transient=is_transient(error.cause))
    except Exception as error:
        return HubFailed(describe(error, request, str(_cache(request))), is_transient=is_transient(error))


def _end_with_standard_input() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
