"""Lets the ranks of a group succeed or fail together, and learn of a failure while they still work.

Ranks that share tensors by collectives hang when one of them is gone. So the outcome of loading travels through the
group's store, where a rank may look without waiting: whoever fails says so there, and the others look between two
chunks of what they read. A rank of the same machine that died is seen by its process; one of another machine, or one
that is stopped, when the time for agreeing is over. What all end with is decided once, by the rank that knows first.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec

from engine.checkpoint.group_store import GroupStore, StoreLostError
from engine.communication.handler import CommunicationHandler
from engine.communication.peers import Peers, identity
from engine.protocol.errors import is_mistake

PROCESSES = "ryzanstein/processes"  # keys that stay: of a rank that died between two agreements, too, it is known
CHECK_INTERVAL = 0.1  # seconds between two looks at the store while loading
ALIVE_INTERVAL = 1.0  # seconds between two words of a rank that it still works
FIRST_WAIT, LONGEST_WAIT = 0.0002, 0.02  # seconds between two looks while waiting for the others
SHARED_CHUNK_BYTES = 4 << 20  # a store takes values of up to 8 MiB
STORE_SECONDS = 30.0  # that the store may take to answer
FAILURE_SECONDS = 2.0  # that ranks which have not ended yet are waited for, once one has failed
LEAVE_SECONDS = 2.0  # that rank 0, which may keep the store, waits for the others to have read it
DEATH_SECONDS = 1.0  # from a process's last connection to its end


class PeerFailedError(RuntimeError):
    """Another rank failed; its error is what all ranks end with."""


class _Outcome(msgspec.Struct):
    """How a rank fared, or all. `error` is empty where it went well."""

    error: str = ""
    is_user_error: bool = False
    is_own: bool = True  # else it only followed another's


class GroupAgreement:
    """A piece of work that all ranks of a group do, and end together.

        with GroupAgreement(group) as agreement:
            work(agreement.check)

    All ranks leave the block in the same way: if it raised on any, all raise the error of the lowest rank that failed
    by itself, a ValueError if that was one, else a RuntimeError. What is no `Exception` (KeyboardInterrupt, SystemExit)
    leaves at once, and counts as a failure for the others.

    Args:
        group: the ranks. All must come here in the same order.
        timeout_seconds: that ranks which have ended wait while none of the others ends or calls `check`.

    Raises:
        RuntimeError: (on leaving) also when a rank died or does not end in time; it is named.
    """

    def __init__(self, group: CommunicationHandler, *, timeout_seconds: float = 300.0) -> None:
        self._rank, self._size = group.rank, group.world_size
        self._timeout = timeout_seconds
        self._store = None if group.store is None else GroupStore(group.store, min(timeout_seconds, STORE_SECONDS))
        self._prefix = ""
        self._next_check = self._next_word = 0.0
        self._peers = Peers()
        self._unmet = [rank for rank in range(self._size) if rank != self._rank]
        self._shared: list[str] = []  # keys of what was shared

    def __enter__(self) -> Self:
        if self._store is not None:
            try:
                # Each rank counts its own, so that all arrive at the same number without waiting for each other.
                number = self._store.add(f"ryzanstein/agreements/{self._rank}", 1)
                self._prefix = f"ryzanstein/agreement-{number}"
                self._store.set(f"{PROCESSES}/{self._rank}", identity())
            except StoreLostError as lost:
                raise RuntimeError(self._explain(lost)) from lost
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._store is None:
            return
        try:
            self._conclude(self._store, error)
        except StoreLostError as lost:
            if error is None or isinstance(error, Exception):
                raise self._unreachable(error, lost) from lost
        finally:
            self._peers.close()
            self._store.close()

    def check(self) -> None:
        """Raise PeerFailedError if another rank has failed or died; looks ten times a second at most."""
        now = time.monotonic()
        if self._store is None or now < self._next_check:
            return
        self._next_check = now + CHECK_INTERVAL
        try:
            if now >= self._next_word:
                self._next_word = now + ALIVE_INTERVAL
                self._store.add(self._key("alive"), 1)
            self._raise_for_peers(self._store)
        except StoreLostError as lost:
            raise PeerFailedError(self._explain(lost)) from lost

    def share(self, name: str, make: Callable[[], bytes]) -> bytes:
        """Return on every rank what `make` returns on rank 0, where alone it is called.

        Raises:
            PeerFailedError: if that failed, or another rank did.
        """
        if self._store is None:
            return make()
        try:
            if self._rank == 0:
                return self._give(self._store, name, make())
            return self._take(self._store, name, giver=0)
        except StoreLostError as lost:
            raise PeerFailedError(self._explain(lost)) from lost

    def gather(self, name: str, content: bytes) -> list[bytes]:
        """Return on rank 0 what each rank gave, in rank order, and nothing on the others, which do not wait.

        Raises:
            PeerFailedError: if another rank failed.
        """
        if self._store is None:
            return [content]
        try:
            if self._rank > 0:
                self._give(self._store, f"{name}/{self._rank}", content)
                return []
            others = [self._take(self._store, f"{name}/{rank}", giver=rank) for rank in range(1, self._size)]
            return [content, *others]
        except StoreLostError as lost:
            raise PeerFailedError(self._explain(lost)) from lost

    # --- giving and taking -------------------------------------------------------------------------------------------

    def _give(self, store: GroupStore, name: str, content: bytes) -> bytes:
        chunks = [content[i : i + SHARED_CHUNK_BYTES] for i in range(0, len(content), SHARED_CHUNK_BYTES)]
        for index, chunk in enumerate(chunks):
            store.set(self._key(name, "chunk", index), chunk)
        store.set(self._key(name, "count"), str(len(chunks)))
        self._remember(name, len(chunks))
        return content

    def _take(self, store: GroupStore, name: str, giver: int) -> bytes:
        patience = _Patience(self._timeout)
        while not store.has(self._key(name, "count")):
            patience.pause()
            self._raise_for_peers(store)
            if patience.is_over(store.add(self._key("alive"), 0)):
                raise PeerFailedError(f"rank {giver} does not answer")
        self._meet_peers(store)  # rank 0, which may keep the store, before it can be lost
        count = int(store.get(self._key(name, "count")))
        self._remember(name, count)
        return b"".join(store.get(self._key(name, "chunk", index)) for index in range(count))

    def _remember(self, name: str, count: int) -> None:
        self._shared += [self._key(name, "count"), *(self._key(name, "chunk", index) for index in range(count))]

    # --- ending together ---------------------------------------------------------------------------------------------

    def _conclude(self, store: GroupStore, error: BaseException | None) -> None:
        outcome = _outcome(error)
        store.set(self._key("outcome", self._rank), msgspec.json.encode(outcome))
        if outcome.error:
            store.set(self._key("failed"), "yes")
        if error is not None and not isinstance(error, Exception):
            return  # whoever interrupts does not want to wait
        reason = self._wait_for_outcomes(store)
        proposal = self._result(store, reason)
        decided = store.propose(self._key("verdict"), msgspec.json.encode(proposal).decode())
        verdict = msgspec.json.decode(decided, type=_Outcome)
        if verdict.error:
            store.set(self._key("failed"), "yes")
        self._leave(store)
        if verdict.error:
            raise (ValueError if verdict.is_user_error else RuntimeError)(verdict.error) from error

    def _wait_for_outcomes(self, store: GroupStore) -> str:
        """Wait until all ranks have ended, or that makes no sense; return what is said of those that have not."""
        keys = [self._key("outcome", rank) for rank in range(self._size)]
        patience, after_failure = _Patience(self._timeout), _Patience(FAILURE_SECONDS)
        while not store.has(*keys):
            patience.pause()
            if (died := self._dead_peer(store)) is not None:
                return died
            if store.has(self._key("verdict")):
                return ""
            has_failed = store.has(self._key("failed"))
            if (has_failed and after_failure.is_over(0)) or patience.is_over(store.add(self._key("alive"), 0)):
                silent = [str(rank) for rank, key in enumerate(keys) if not store.has(key)]
                return f"rank {', '.join(silent)} does not answer"
            if not has_failed:
                after_failure = _Patience(FAILURE_SECONDS)
        return ""

    def _result(self, store: GroupStore, reason: str) -> _Outcome:
        """Return what to end with: the lowest rank's failure of its own, else why ranks have not ended."""
        outcomes = []
        for rank in range(self._size):
            key = self._key("outcome", rank)
            if store.has(key):
                outcomes.append(msgspec.json.decode(store.get(key), type=_Outcome))
        failures = [outcome for outcome in outcomes if outcome.error]
        for failure in failures:
            if failure.is_own:
                return failure
        if failures and not reason.endswith(" died"):
            return failures[0]  # it saw a death that cannot be seen from here
        return _Outcome(reason)

    def _leave(self, store: GroupStore) -> None:
        """Say that the verdict was read; rank 0, with which the store may end, waits for all who live to say so."""
        store.set(self._key("left", self._rank), "yes")
        if self._rank != 0:
            return
        left = [self._key("left", rank) for rank in range(self._size)]
        patience = _Patience(LEAVE_SECONDS)
        while not store.has(*left):
            patience.pause()
            living = [key for rank, key in enumerate(left) if rank not in self._peers.ended()]
            if patience.is_over(0) or (len(living) < self._size and store.has(*living)):
                return
        ranks = range(self._size)
        own = [self._key(word, rank) for word in ("outcome", "left") for rank in ranks]
        store.delete([*self._shared, *own, *map(self._key, ("alive", "failed", "verdict"))])

    # --- the others --------------------------------------------------------------------------------------------------

    def _raise_for_peers(self, store: GroupStore) -> None:
        if store.has(self._key("failed")):
            raise PeerFailedError("another rank failed")
        if (died := self._dead_peer(store)) is not None:
            raise PeerFailedError(died)

    def _dead_peer(self, store: GroupStore) -> str | None:
        """Return what is said of a rank that died before it said how it fared."""
        self._meet_peers(store)
        for rank in sorted(self._peers.ended()):
            if not store.has(self._key("outcome", rank)):
                return f"rank {rank} died"
        return None

    def _meet_peers(self, store: GroupStore) -> None:
        """Take hold of the processes of ranks that have come since the last look."""
        for rank in list(self._unmet):
            key = f"{PROCESSES}/{rank}"
            if store.has(key):
                self._unmet.remove(rank)
                self._peers.meet(rank, store.get(key))

    def _explain(self, lost: StoreLostError) -> str:
        if self._peers.has_ended(0, DEATH_SECONDS):  # which usually keeps it
            return "rank 0 died"
        return f"the ranks' store cannot be reached any more: {lost}"

    def _unreachable(self, error: BaseException | None, lost: StoreLostError) -> Exception:
        """Return what this rank ends with when it cannot know how the others do: its own failure, if it has one."""
        outcome = _outcome(error)
        if outcome.error:
            return (ValueError if outcome.is_user_error else RuntimeError)(outcome.error)
        return RuntimeError(self._explain(lost))

    def _key(self, *words: object) -> str:
        return "/".join((self._prefix, *map(str, words)))


class _Patience:
    """Looks more and more rarely, and for as long as others are seen to work."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._pause = FIRST_WAIT
        self._heard = -1

    def pause(self) -> None:
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, LONGEST_WAIT)

    def is_over(self, words: int) -> bool:
        """Whether nobody has said a word more, of `words` until now, for so long."""
        if words != self._heard:
            self._heard = words
            self._deadline = time.monotonic() + self._seconds
        return time.monotonic() > self._deadline


def _outcome(error: BaseException | None) -> _Outcome:
    if error is None:
        return _Outcome()
    is_own = not isinstance(error, PeerFailedError)
    if is_mistake(error):
        return _Outcome(_one_line(error), is_user_error=True)
    return _Outcome(_one_line(error) if not is_own else f"{type(error).__name__}: {_one_line(error)}", is_own=is_own)


def _one_line(error: BaseException) -> str:
    """Return what an error says, in characters that can be written."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.encode(errors="backslashreplace").decode()
