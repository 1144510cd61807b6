"""How a group of ranks is lost, and what is said of it."""

import time
from typing import NamedTuple

from engine.orchestrator.launcher import Ranks, describe_exit
from engine.protocol.messages import Failed, Message


class Loss(NamedTuple):
    """Why a group cannot go on."""

    cause: str  # one line
    kind: str  # as in `Recovery`
    is_user_error: bool = False  # then another group could not either


class GroupLostError(RuntimeError):
    """The ranks of an epoch are gone, or must go; others may take their place."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss.cause)
        self.loss = loss
        self.noticed_at = time.time()  # seconds since the epoch of the calendar
        self._noticed = time.monotonic()

    def seconds_ago(self) -> float:
        """Return how long ago it was noticed."""
        return time.monotonic() - self._noticed


class StartError(RuntimeError):
    """A rank says that it cannot start: the next would say the same."""


def killed_rank(ranks: Ranks) -> int | None:
    """Return a rank that a signal has ended, if there is one."""
    return next((rank for rank, code in ranks.dead().items() if code < 0), None)


def diagnose(messages: list[Message], ranks: Ranks) -> Loss:
    """Return the likeliest first cause of a group's end, when a rank has ended or said that it failed.

    A mistake of the user explains everything; a rank that a signal ended explains why the others lost a peer.
    """
    failures = [message for message in messages if isinstance(message, Failed)]
    for failed in failures:
        if failed.is_user_error:
            return Loss(failed.error, "failed", is_user_error=True)
    rank = killed_rank(ranks)
    if rank is None and failures:
        return Loss(f"rank {failures[0].rank} failed: {failures[0].error}", "failed")
    dead = ranks.dead()
    rank = next(iter(dead)) if rank is None else rank
    return Loss(f"rank {rank} (pid {ranks.pid(rank)}) {describe_exit(dead[rank])}", "died")
