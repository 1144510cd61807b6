"""The service's end in order: what was accepted finishes, what comes now is refused."""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager


class Drain:
    """Whether the service is ending, and the requests that it waits for then."""

    def __init__(self) -> None:
        self.is_draining = False
        self._num_requests = 0
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @property
    def num_requests(self) -> int:
        """Requests in progress."""
        return self._num_requests

    def begin(self) -> None:
        """Refuse what comes from now on."""
        self.is_draining = True

    async def until_empty(self) -> None:
        """Wait until no request is in progress."""
        await self._is_empty.wait()

    @contextmanager
    def request(self) -> Generator[None, None, None]:
        """Count a request for as long as the block runs."""
        self._num_requests += 1
        self._is_empty.clear()
        try:
            yield
        finally:
            self._num_requests -= 1
            if not self._num_requests:
                self._is_empty.set()
