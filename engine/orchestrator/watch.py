"""Finds ranks that hang: in a step and getting no further, or stopped."""

import time
from collections.abc import Sequence
from pathlib import Path

from engine.orchestrator.launcher import Ranks
from engine.orchestrator.loss import Loss
from engine.protocol.beats import Beats

LONGEST_PERIOD = 1.0  # seconds from one look to the next
LOOKS = 8  # within the time-out, at least


class Watch:
    """Looks at the ranks now and then.

    Only time in which this process itself looked counts: after a machine or a container was stopped as a whole, nobody
    has been silent for longer than anybody else.

    Args:
        beats: what the ranks say of how far they have come.
        ranks: their processes.
        world_size: how many there are.
        timeout: seconds after which a rank hangs.
    """

    def __init__(self, beats: Beats, ranks: Ranks, world_size: int, timeout: float) -> None:
        self._beats = beats
        self._ranks = ranks
        self._timeout = timeout
        self._period = min(LONGEST_PERIOD, timeout / LOOKS)
        self._looked_at = time.monotonic()
        self._last = [0] * world_size
        self._silent_for = [0.0] * world_size
        self._stopped_for: list[float | None] = [None] * world_size  # None: it runs

    def seconds_until_due(self) -> float:
        """Return the seconds until the next look, 0 if it is due."""
        return max(0.0, self._looked_at + self._period - time.monotonic())

    def look(self) -> Loss | None:
        """Look at all ranks; return what is wrong with those that hang, if there are any."""
        now = time.monotonic()
        elapsed, self._looked_at = min(now - self._looked_at, 2 * self._period), now
        are_stopped = [self._is_stopped(rank) for rank in range(len(self._last))]
        silence = 0.0 if any(are_stopped) else elapsed  # the others wait for one that is stopped
        for rank, last in enumerate(self._last):
            self._last[rank] = beat = self._beats.last(rank)
            self._silent_for[rank] = self._silent_for[rank] + silence if beat and beat == last else 0.0
            stopped_for = self._stopped_for[rank]
            since = 0.0 if stopped_for is None else stopped_for + elapsed
            self._stopped_for[rank] = since if are_stopped[rank] else None
        return self._loss(self._stopped_for, "was stopped, and not continued within") or self._loss(
            self._silent_for, "got no further with a step within"
        )

    def _loss(self, seconds: Sequence[float | None], what: str) -> Loss | None:
        hung = [rank for rank, of_rank in enumerate(seconds) if of_rank is not None and of_rank > self._timeout]
        return Loss(f"{self._named(hung)} {what} {self._timeout:g} s", "hung") if hung else None

    def stopped(self) -> Loss | None:
        """Return that a rank is stopped at present, if one is."""
        stopped = [rank for rank in range(len(self._last)) if self._is_stopped(rank)]
        return Loss(f"{self._named(stopped)} was stopped", "hung") if stopped else None

    def _named(self, ranks: list[int]) -> str:
        return ", ".join(f"rank {rank} (pid {self._ranks.pid(rank)})" for rank in ranks)

    def _is_stopped(self, rank: int) -> bool:
        try:
            stat = Path(f"/proc/{self._ranks.pid(rank)}/stat").read_bytes()
        except OSError:  # it has just been reaped
            return False
        return stat[stat.rindex(b")") + 2 :].startswith(b"T")
