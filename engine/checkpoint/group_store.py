"""The store that a group's ranks share, asked in a way that always comes to an end.

The store lives in one process, often rank 0's. Where that process is stopped, torch waits for its answer for ever: so a
thread of its own asks.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class StoreLostError(RuntimeError):
    """The store cannot be reached any more."""


class GroupStore:
    """Texts by key, which all ranks of a group read and write.

    Args:
        store: torch's.
        seconds: that an answer may take. One that did not come is the end: nothing is asked any more.

    Raises:
        StoreLostError: (each method but `close`) if the store does not answer.
    """

    def __init__(self, store: Any, seconds: float) -> None:
        self._store = store
        self._seconds = seconds
        self._lost = ""
        self._questions: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._answer, name="group-store", daemon=True).start()

    def set(self, key: str, value: bytes | str) -> None:
        """Write a value."""
        self._ask(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes:
        """Return a value that is there."""
        return self._ask(lambda: bytes(self._store.get(key)))

    def has(self, *keys: str) -> bool:
        """Whether there is a value for each of the keys."""
        return self._ask(lambda: bool(self._store.check(list(keys))))

    def add(self, key: str, count: int) -> int:
        """Add to a number, which is 0 at first, and return it."""
        return self._ask(lambda: int(self._store.add(key, count)))

    def propose(self, key: str, value: str) -> bytes:
        """Write a value unless there is one already; return the one that is there then."""
        return self._ask(lambda: bytes(self._store.compare_set(key, "", value)))

    def delete(self, keys: list[str]) -> None:
        """Remove values that may be there."""
        self._ask(lambda: [self._store.delete_key(key) for key in keys])

    def close(self) -> None:
        """Ask nothing any more."""
        self._questions.put(None)

    def _ask(self, question: Callable[[], T]) -> T:
        if self._lost:
            raise StoreLostError(self._lost)
        answer: Future[T] = Future()
        self._questions.put((question, answer))
        try:
            return answer.result(self._seconds)
        except TimeoutError as error:
            self._lost = f"no answer within {self._seconds:g} s"
            raise StoreLostError(self._lost) from error
        except (RuntimeError, OSError) as error:  # torch.distributed.DistError is one
            self._lost = str(error).partition("\n")[0]
            raise StoreLostError(self._lost) from error

    def _answer(self) -> None:
        while (item := self._questions.get()) is not None:
            question, answer = item
            try:
                answer.set_result(question())
            except Exception as error:  # whatever it is, the asking thread raises it
                answer.set_exception(error)
