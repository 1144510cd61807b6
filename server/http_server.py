"""The HTTP server: uvicorn, with signals left to us and bounds on what clients send."""

import asyncio
import contextlib
from collections.abc import Generator

import uvicorn
from starlette.types import ASGIApp

from server.config import ServerConfig
from server.credentials import Credentials
from server.http_protocol import BoundedHTTPProtocol

GRACE_SECONDS = 2  # for error events to reach slow clients
KEEP_ALIVE_SECONDS = 30


class HTTPServer(uvicorn.Server):
    """Leaves signals to us, since an end has more parts than the HTTP server's, and sleeps longer while it is idle."""

    def __init__(self, app: ASGIApp, config: ServerConfig, credentials: Credentials) -> None:
        tls = credentials.tls
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedHTTPProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                root_path=config.root_path,
                ssl_context_factory=None if tls is None else lambda _, __: tls,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Take no more connections, and end when the open ones have."""
        self.should_exit = True
        self._stopping.set()

    async def main_loop(self) -> None:
        """Wait for the end; wake up once a second, to set the responses' Date header."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), 1.0)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals as they are."""
        yield
