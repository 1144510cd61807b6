"""Who is next: a queue that callers share by how many tokens each was served, not by how many requests each sends.

Start-time fair queueing (Goyal, Vin, Cheng, 1996) by tokens, as Sheng et al. count them ("Fairness in Serving Large
Language Models", 2024): prompt tokens when a request begins, the others when they are generated. The next is the oldest
of the caller who was served least. Who comes back after a pause does not make up for it: its count is moved up to where
those stand that were served meanwhile.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class _Share(Generic[T]):
    """What one caller was served, in tokens, and what of it waits."""

    served: int = 0
    waiting: "OrderedDict[T, None]" = field(default_factory=OrderedDict)


class FairQueue(Generic[T]):
    """Items that wait, each for a caller known by name; the names are few, and are kept."""

    def __init__(self) -> None:
        self._ahead: OrderedDict[T, None] = OrderedDict()
        self._shares: dict[str, _Share[T]] = {}
        self._now = 0  # what who was last to be next had been served by then

    def __len__(self) -> int:
        """Items that wait."""
        return len(self._ahead) + sum(len(share.waiting) for share in self._shares.values())

    def push(self, name: str, item: T) -> None:
        """Add an item behind the others of its caller."""
        share = self._share(name)
        if not share.waiting:
            share.served = max(share.served, self._now)
        share.waiting[item] = None

    def push_ahead(self, item: T) -> None:
        """Add an item that goes before all that `push` added, behind those that were added like it."""
        self._ahead[item] = None

    def next(self) -> T | None:
        """Return who is next, who stays where it is; None where nobody waits."""
        if self._ahead:
            return next(iter(self._ahead))
        waiting = (share for share in self._shares.values() if share.waiting)
        share = min(waiting, key=lambda share: share.served, default=None)
        if share is None:
            return None
        self._now = max(self._now, share.served)
        return next(iter(share.waiting))

    def remove(self, name: str, item: T) -> None:
        """Take out an item that waits."""
        if item in self._ahead:
            del self._ahead[item]
        else:
            del self._share(name).waiting[item]

    def charge(self, name: str, num_tokens: int) -> None:
        """Count what a caller was served."""
        self._share(name).served += num_tokens

    def _share(self, name: str) -> _Share[T]:
        return self._shares.setdefault(name, _Share())
