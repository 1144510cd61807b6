"""How far all ranks together have come with their weights, and when the server should hear of it."""

import math
import time

from engine.protocol.messages import Loading

REPORT_INTERVAL = 0.25  # seconds; as often for eight ranks as for one


class LoadingProgress:
    """Adds up what the ranks say of their loading. A rank that has said nothing yet counts for nothing."""

    def __init__(self) -> None:
        self._heard: dict[int, Loading] = {}
        self._reported_at = -math.inf
        self._has_news = False

    def hear(self, loading: Loading) -> None:
        """Take a rank's word of how far it has come."""
        self._heard[loading.rank] = loading
        self._has_news = True

    @property
    def loaded_bytes(self) -> int:
        """Bytes that are loaded, of all ranks heard of."""
        return sum(loading.loaded_bytes for loading in self._heard.values())

    @property
    def total_bytes(self) -> int:
        """Bytes that there are to load on all ranks heard of; 0 before the first word."""
        return sum(loading.total_bytes for loading in self._heard.values())

    def seconds_until_due(self) -> float | None:
        """Return the seconds until the server should hear of it, 0 if now, None if there is no news."""
        if not self._has_news:
            return None
        if self.loaded_bytes >= self.total_bytes:
            return 0.0
        return max(0.0, self._reported_at + REPORT_INTERVAL - time.monotonic())

    def note_report(self) -> None:
        """Say that the server hears of the present state."""
        self._reported_at = time.monotonic()
        self._has_news = False
