"""A small hub on loopback: what huggingface_hub asks of the real one, answered from memory.

Large files are redirected to another host (`localhost` instead of `127.0.0.1`), as the real hub does, and come from
there in ranges. What was asked for, and with which token, is noted.
"""

import hashlib
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from tests.http_server import HTTPServer

LARGE = 100_000  # bytes; from here on a file is stored beside the repository, under its SHA-256
CHUNK = 1 << 18


@dataclass
class Repository:
    """A model: the files of each revision."""

    revisions: dict[str, dict[str, bytes]]
    token: str | None = None  # who does not have it gets no file
    is_private: bool = False  # and does not even hear that the model is there

    def commit(self, revision: str) -> str | None:
        """Return the commit of a branch or commit, if it is one."""
        for name, files in self.revisions.items():
            commit = hashlib.sha1(json.dumps([(path, blob_id(files[path])) for path in sorted(files)]).encode())
            if revision in (name, commit.hexdigest()):
                return commit.hexdigest()
        return None

    def files(self, revision: str) -> dict[str, bytes]:
        """Return the files of a revision that is there."""
        return next(files for name, files in self.revisions.items() if self.commit(name) == self.commit(revision))


def files_of(directory: Path) -> dict[str, bytes]:
    """Return a directory's files."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def blob_id(content: bytes) -> str:
    """Return git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Asked:
    """One request."""

    method: str
    path: str
    host: str
    token: str | None
    range: str | None


@dataclass
class Hub:
    """`with Hub({"org/name": Repository(...)}) as hub:` listens inside the block; `environment` leads there."""

    repositories: dict[str, Repository]
    bytes_per_second: float = float("inf")  # of all large files together
    asked: list[Asked] = field(default_factory=list)
    sent: int = 0  # bytes of large files
    holds_after: int | None = None  # bytes of large files: no more is sent
    num_sending: int = 0  # large files
    knows_ranges: bool = True
    refuses_with: HTTPStatus | None = None  # whatever it is asked
    refusal: str = ""  # the hub's word for why
    listed_sizes: dict[str, int] = field(default_factory=dict)  # lies, by file name

    def __enter__(self) -> Self:
        self.lock = threading.Lock()
        revisions = [files for repository in self.repositories.values() for files in repository.revisions.values()]
        large = {id(file): file for files in revisions for file in files.values() if len(file) >= LARGE}
        self._large = {hashlib.sha256(file).hexdigest(): file for file in large.values()}
        hub = self

        class Handler(_Handler):
            def __init__(self, *arguments: Any) -> None:
                self.hub = hub
                super().__init__(*arguments)

        self._server = HTTPServer(Handler)
        self._server.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.holds_after = None  # else those that send would never end
        self._server.__exit__(kind, error, traceback)

    @property
    def url(self) -> str:
        """Where it is."""
        return self._server.url

    @property
    def port(self) -> int:
        """Of the other host, too."""
        return self._server.port

    def environment(self, home: Path) -> dict[str, str]:
        """Return variables that lead to this hub, with its cache in `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": ""}

    def paths(self, method: str) -> list[str]:
        """Return the files that were asked for in this way, by name."""
        return [asked.path.rpartition("/")[2] for asked in self.asked if asked.method == method]

    def blob(self, digest: str) -> bytes | None:
        """Return a large file by its SHA-256."""
        return self._large.get(digest)

    def digest(self, content: bytes) -> str:
        """Return a large file's SHA-256."""
        return next(digest for digest, other in self._large.items() if other is content)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        """Be silent."""

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def _handle(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(
            Asked(self.command, path, self.headers["Host"].partition(":")[0], token, self.headers.get("Range"))
        )
        if self.hub.refuses_with is not None:
            self._refuse(self.hub.refuses_with, self.hub.refusal)
        elif path.startswith("/large/"):
            self._send_large(path.removeprefix("/large/"))
        elif path.startswith("/api/models/"):
            self._send_listing(path.removeprefix("/api/models/"), token)
        else:
            self._send_file(path.removeprefix("/"), token)

    def _send_listing(self, path: str, token: str | None) -> None:
        name, _, revision = path.partition("/revision/")
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.is_private and token != repository.token):
            self._refuse(HTTPStatus.UNAUTHORIZED, "RepoNotFound")
        elif token is not None and token != (repository.token or token):
            self._refuse(HTTPStatus.UNAUTHORIZED, "", "Invalid credentials in Authorization header")
        elif (commit := repository.commit(revision or "main")) is None:
            self._refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        else:
            siblings = [self._sibling(path, content) for path, content in repository.files(commit).items()]
            answer = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []}
            self._answer(HTTPStatus.OK, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _send_file(self, path: str, token: str | None) -> None:
        name, _, rest = path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._refuse(HTTPStatus.NOT_FOUND, "RepoNotFound")
        elif repository.token is not None and token != repository.token:
            self._refuse(HTTPStatus.UNAUTHORIZED if token is None else HTTPStatus.FORBIDDEN, "GatedRepo")
        elif (commit := repository.commit(revision)) is None:
            self._refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        elif file not in repository.files(commit):
            self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound")
        else:
            self._send_content(repository.files(commit)[file], commit)

    def _send_content(self, content: bytes, commit: str) -> None:
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob_id(content)}"'}
        if len(content) < LARGE:
            self._answer(HTTPStatus.OK, headers, content)
            return
        digest = self.hub.digest(content)
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        headers["Location"] = f"http://localhost:{self.hub.port}/large/{digest}"
        self._answer(HTTPStatus.FOUND, headers, b"")

    def _send_large(self, digest: str) -> None:
        content = self.hub.blob(digest)
        if content is None:
            self._refuse(HTTPStatus.NOT_FOUND, "")
            return
        wanted = self.headers.get("Range", "bytes=0-") if self.hub.knows_ranges else "bytes=0-"
        begin = int(wanted.removeprefix("bytes=").partition("-")[0])
        self.send_response(HTTPStatus.PARTIAL_CONTENT if begin else HTTPStatus.OK)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if self.command == "GET":
            with self.hub.lock:
                self.hub.num_sending += 1
            self._send_slowly(memoryview(content)[begin:])
            with self.hub.lock:
                self.hub.num_sending -= 1

    def _send_slowly(self, content: memoryview) -> None:
        for begin in range(0, len(content), CHUNK):
            chunk = content[begin : begin + CHUNK]
            time.sleep(len(chunk) / self.hub.bytes_per_second)
            while self.hub.holds_after is not None and self.hub.sent >= self.hub.holds_after:
                time.sleep(0.01)
            try:
                self.wfile.write(chunk)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
                return
            with self.hub.lock:
                self.hub.sent += len(chunk)

    def _refuse(self, status: HTTPStatus, code: str, message: str = "refused") -> None:
        self._answer(status, {"X-Error-Code": code, "X-Error-Message": message}, b"")

    def _answer(self, status: HTTPStatus, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _sibling(self, path: str, content: bytes) -> dict[str, Any]:
        size = self.hub.listed_sizes.get(path, len(content))
        sibling: dict[str, Any] = {"rfilename": path, "size": size, "blobId": blob_id(content)}
        if len(content) >= LARGE:
            sibling["lfs"] = {"sha256": self.hub.digest(content), "size": size, "pointerSize": 134}
        return sibling
