"""Lets the ranks of a group succeed or fail together, and learn of a failure while they still work.

Ranks that share tensors by collectives hang when one of them is gone. So the outcome of loading travels through the
group's store, where a rank may look without waiting: whoever fails says so there, and the others look between two
chunks of what they read. A rank of the same machine that died is seen by its process; one of another machine, or one
that is stopped, when the time for agreeing is over.
"""

import contextlib
import os
import select
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import torch.distributed as dist

from engine.communication.handler import CommunicationHandler

CHECK_INTERVAL = 0.1  # seconds between two looks at the store while loading
FIRST_WAIT, LONGEST_WAIT = 0.0002, 0.02  # seconds between two looks while waiting for the others
SHARED_CHUNK_BYTES = 4 << 20  # a store takes values of up to 8 MiB
LEAVE_SECONDS = 5.0  # that rank 0, which may keep the store, waits for the others to have read it


class PeerFailedError(RuntimeError):
    """Another rank failed; its error is what all ranks end with."""


class _Outcome(msgspec.Struct):
    """How a rank fared. `error` is empty where it went well."""

    error: str = ""
    is_user_error: bool = False
    is_own: bool = True  # else it only followed another's


class GroupAgreement:
    """A piece of work that all ranks of a group do, and end together.

        with GroupAgreement(group) as agreement:
            work(agreement.check)

    All ranks leave the block in the same way: if it raised on any, all raise the error of the lowest rank that failed
    by itself, a ValueError if that was one, else a RuntimeError.

    Args:
        group: the ranks. All must come here in the same order.
        timeout_seconds: for the slowest rank to end its work after this one has.

    Raises:
        RuntimeError: (on leaving) also when a rank died or does not end in time; it is named.
    """

    def __init__(self, group: CommunicationHandler, *, timeout_seconds: float = 300.0) -> None:
        self._rank, self._size = group.rank, group.world_size
        self._timeout = timeout_seconds
        self._store: Any = group.store
        self._prefix = ""
        self._next_check = 0.0
        self._peers: dict[int, int] = {}  # process descriptors of the other ranks on this machine
        self._unknown = [rank for rank in range(self._size) if rank != self._rank]

    def __enter__(self) -> Self:
        if self._store is not None:
            # Each rank counts its own, so that all arrive at the same number without waiting for each other.
            number = self._store.add(f"ryzanstein/agreements/{self._rank}", 1)
            self._prefix = f"ryzanstein/agreement-{number}"
            self._store.set(self._key("process", self._rank), msgspec.json.encode([_machine(), os.getpid()]))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._store is None or (error is not None and not isinstance(error, Exception)):
            return
        try:
            self._conclude(error)
        except (dist.DistError, ConnectionError) as lost:
            raise RuntimeError(f"the ranks' store cannot be reached any more: {_one_line(lost)}") from lost
        finally:
            for descriptor in self._peers.values():
                os.close(descriptor)
            self._peers.clear()

    def check(self) -> None:
        """Raise PeerFailedError if another rank has failed or died; looks ten times a second at most."""
        now = time.monotonic()
        if self._store is None or now < self._next_check:
            return
        self._next_check = now + CHECK_INTERVAL
        self._raise_for_peers()

    def share(self, name: str, make: Callable[[], bytes]) -> bytes:
        """Return on every rank what `make` returns on rank 0, where alone it is called.

        Raises:
            PeerFailedError: if that failed, or another rank did.
        """
        if self._store is None:
            return make()
        if self._rank == 0:
            content = make()
            chunks = [content[i : i + SHARED_CHUNK_BYTES] for i in range(0, len(content), SHARED_CHUNK_BYTES)]
            for index, chunk in enumerate(chunks):
                self._store.set(self._key(name, index), chunk)
            self._store.set(self._key(name, "count"), str(len(chunks)))
            return content
        self._wait_for([self._key(name, "count")])
        count = int(self._store.get(self._key(name, "count")))
        return b"".join(self._store.get(self._key(name, index)) for index in range(count))

    def _conclude(self, error: Exception | None) -> None:
        outcome = _outcome(error)
        self._store.set(self._key("outcome", self._rank), msgspec.json.encode(outcome))
        if outcome.error:
            self._store.set(self._key("failed"), "yes")
        dead = self._wait_for_outcomes()
        failed = dead is not None or self._store.check([self._key("failed")])
        cause = self._first_failure() if failed else None
        self._leave()
        if cause is not None and cause.is_own:
            raise (ValueError if cause.is_user_error else RuntimeError)(cause.error) from error
        if dead is not None:
            raise RuntimeError(dead) from error
        if error is not None:
            raise RuntimeError(_one_line(error)) from error

    def _wait_for_outcomes(self) -> str | None:
        """Wait until all ranks have ended; return what is said of one that never will."""
        try:
            self._wait_for([self._key("outcome", rank) for rank in range(self._size)], heed_failures=False)
        except PeerFailedError as error:
            return str(error)
        return None

    def _first_failure(self) -> _Outcome | None:
        """Return the lowest rank's outcome that is a failure of its own; else any failure."""
        failures = []
        for rank in range(self._size):
            key = self._key("outcome", rank)
            if self._store.check([key]):
                failures.append(msgspec.json.decode(self._store.get(key), type=_Outcome))
        return next((item for item in failures if item.error and item.is_own), None)

    def _leave(self) -> None:
        """Say that the outcomes were read; rank 0, with which the store may end, waits for all who live to say so."""
        self._store.set(self._key("left", self._rank), "yes")
        if self._rank == 0:
            deadline = time.monotonic() + LEAVE_SECONDS
            keys = [self._key("left", rank) for rank in range(self._size)]
            with contextlib.suppress(PeerFailedError):
                self._wait_for(keys, heed_failures=False, deadline=deadline)

    def _wait_for(self, keys: list[str], *, heed_failures: bool = True, deadline: float | None = None) -> None:
        """Wait until the store has all keys."""
        deadline = deadline or time.monotonic() + self._timeout
        pause = FIRST_WAIT
        while not self._store.check(keys):
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_WAIT)
            if heed_failures:
                self._raise_for_peers()
            elif (died := self._dead_peer(keys)) is not None:
                raise PeerFailedError(died)
            if time.monotonic() > deadline:
                silent = [key.rsplit("/", 1)[1] for key in keys if not self._store.check([key])]
                raise PeerFailedError(f"rank {', '.join(silent)} does not answer")

    def _raise_for_peers(self) -> None:
        if self._store.check([self._key("failed")]):
            raise PeerFailedError("another rank failed")
        if (died := self._dead_peer([])) is not None:
            raise PeerFailedError(died)

    def _dead_peer(self, keys: list[str]) -> str | None:
        """Return what is said of a rank that died before it said what is waited for."""
        self._meet_peers()
        if not self._peers:
            return None
        poller = select.poll()
        for descriptor in self._peers.values():
            poller.register(descriptor, select.POLLIN)
        ended = {descriptor for descriptor, _ in poller.poll(0)}
        for rank, descriptor in self._peers.items():
            said = [key for key in keys if key.endswith(f"/{rank}")] or [self._key("outcome", rank)]
            if descriptor in ended and not self._store.check(said):
                return f"rank {rank} died"
        return None

    def _meet_peers(self) -> None:
        """Take hold of the processes of ranks on this machine that have come since the last look."""
        for rank in list(self._unknown):
            key = self._key("process", rank)
            if not self._store.check([key]):
                continue
            self._unknown.remove(rank)
            machine, pid = msgspec.json.decode(self._store.get(key), type=tuple[str, int])
            if machine == _machine():
                with contextlib.suppress(OSError):  # it has ended; then it has said how, or the time-out tells
                    self._peers[rank] = os.pidfd_open(pid)

    def _key(self, *words: object) -> str:
        return "/".join((self._prefix, *map(str, words)))


def _outcome(error: Exception | None) -> _Outcome:
    if error is None:
        return _Outcome()
    is_own = not isinstance(error, PeerFailedError)
    if isinstance(error, ValueError):
        return _Outcome(_one_line(error), is_user_error=True)
    return _Outcome(_one_line(error) if not is_own else f"{type(error).__name__}: {_one_line(error)}", is_own=is_own)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _machine() -> str:
    """Return what tells processes apart that this one can see from those that it cannot."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
