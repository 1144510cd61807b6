"""The HTTP server: uvicorn, with signals left to us and bounds on what clients send."""

import asyncio
import contextlib
from collections.abc import Callable, Generator

import uvicorn
from starlette.types import ASGIApp

from server.config import ServerConfig
from server.credentials import Credentials
from server.drain import Drain
from server.http_protocol import BoundedHTTPProtocol, protocol_of

GRACE_SECONDS = 2  # for error events to reach slow clients
LOOK_SECONDS = 0.05  # between two looks at what clients have taken
KEEP_ALIVE_SECONDS = 30


class HTTPServer(uvicorn.Server):
    """Leaves signals to us, since an end has more parts than the HTTP server's, and sleeps longer while it is idle."""

    def __init__(
        self,
        app: ASGIApp,
        config: ServerConfig,
        credentials: Credentials,
        drain: Drain,
        on_slow_client: Callable[[], object],
    ) -> None:
        """Prepare the server; `on_slow_client` is called for each client that is cut off since it takes nothing."""
        tls = credentials.tls
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol_of(config.slow_client_timeout, on_slow_client, lambda: not drain.is_draining),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                root_path=config.root_path,
                ssl_context_factory=None if tls is None else lambda _, __: tls,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                reset_contextvars=True,  # else a pipelined request begins in the context of the one before it
            )
        )
        self._stopping = asyncio.Event()

    def stop(self, seconds: float = GRACE_SECONDS) -> None:
        """Take no more connections, and end when the open ones have, or after so many seconds."""
        self.config.timeout_graceful_shutdown = seconds  # type: ignore[assignment]  # it waits for fractions, too
        self.should_exit = True
        self._stopping.set()

    def close_when_idle(self) -> None:
        """Close connections that wait for a request, and the others behind their answers."""
        for connection in self._connections():
            connection.close_when_idle()

    async def until_taken(self) -> None:
        """Wait until clients have taken all that was sent to them."""
        while any(connection.num_untaken for connection in self._connections()):
            await asyncio.sleep(LOOK_SECONDS)

    def _connections(self) -> list[BoundedHTTPProtocol]:
        return [each for each in self.server_state.connections if isinstance(each, BoundedHTTPProtocol)]

    async def main_loop(self) -> None:
        """Wait for the end; wake up once a second, to set the responses' Date header."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), 1.0)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals as they are."""
        yield
