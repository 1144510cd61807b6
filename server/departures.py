"""How fast requests leave the engine: what those are told who come when it is too much."""

import math
from collections import deque

WINDOW_SECONDS = 30.0  # of the past that says how fast it is at present
MOST_SECONDS = 600  # that anybody is told to wait


class Departures:
    """The rate of the last `WINDOW_SECONDS`, or since the engine has something to do. Times are one clock's seconds."""

    def __init__(self) -> None:
        self._begin = 0.0
        self._counts: deque[tuple[int, int]] = deque()  # second of the clock, how many left in it

    def begin(self, now: float) -> None:
        """Note that the engine, which was idle, has something to do: nothing could leave before."""
        self._begin = now
        self._counts.clear()

    def add(self, now: float) -> None:
        """Note that a request leaves."""
        second = int(now)
        count = self._counts.pop()[1] if self._counts and self._counts[-1][0] == second else 0
        self._counts.append((second, count + 1))
        self._drop_old(now)

    def seconds_until(self, num_requests: int, now: float) -> int:
        """Return in how many whole seconds, at least 1, so many will have left at the present rate."""
        self._drop_old(now)
        elapsed = min(now - self._begin, WINDOW_SECONDS)
        left = max(1, sum(count for _, count in self._counts))  # at most one, where none has yet
        return max(1, min(MOST_SECONDS, math.ceil(num_requests * elapsed / left)))

    def _drop_old(self, now: float) -> None:
        while self._counts and self._counts[0][0] <= now - WINDOW_SECONDS:
            self._counts.popleft()
