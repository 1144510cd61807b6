"""The server process from a started orchestrator to the exit code: one flat sequence."""

import asyncio
import contextlib
import socket
import sys

import uvloop
import zmq.asyncio

from engine.protocol.affinity import keep_process_on
from engine.protocol.messages import GroupStatus
from server.app import create_app
from server.banner import banner, listening_url
from server.config import ServerConfig
from server.credentials import Credentials
from server.engine_client import EngineClient
from server.http_server import HTTPServer
from server.launch import EngineProcess
from server.loading_progress import LoadingProgress
from server.metrics import Metrics
from server.model_source.sharded_weights import ShardedWeights
from server.service import Service, TextModel
from server.signals import are_stop_signals_ignored, on_stop_signal
from server.supervisor import Supervisor
from server.threads import in_daemon_thread

EXIT_STOPPED, EXIT_FAILED, EXIT_USER_ERROR = 0, 1, 2
STOPPING = "The server is shutting down."


def run(
    listener: socket.socket,
    process: EngineProcess,
    model: TextModel,
    weights: ShardedWeights,
    config: ServerConfig,
    credentials: Credentials,
) -> int:
    """Serve until a signal comes or the engine fails, and return the exit code."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(listener, process, model, weights, config, credentials))


async def _serve(
    listener: socket.socket,
    process: EngineProcess,
    model: TextModel,
    weights: ShardedWeights,
    config: ServerConfig,
    credentials: Credentials,
) -> int:
    stopping = asyncio.create_task(_stop_signal())
    context = zmq.asyncio.Context()
    metrics = Metrics()
    client = EngineClient(context, metrics)
    ready = asyncio.Event()
    loading = LoadingProgress(sys.stderr)

    def announce(status: GroupStatus) -> None:
        ready.set()
        keep_process_on(status.service_cpus)
        url = listening_url(listener, "http" if credentials.tls is None else "https")
        sys.stderr.write(banner(status, process.spec, model.name, url) + "\n")
        weights.start_writing()

    app = create_app(Service(model, client, metrics, config), config, credentials)
    http = HTTPServer(app, config, credentials)
    serving = asyncio.create_task(http.serve([listener]))
    supervising = asyncio.create_task(Supervisor(context, process, client, loading.follow, announce).run())
    try:
        await asyncio.wait((serving, supervising, stopping), return_when=asyncio.FIRST_COMPLETED)
        failure = supervising.result() if supervising.done() else None
        await client.close(STOPPING if failure is None else f"The engine failed: {failure.error}")
    finally:
        loading.close()
        supervising.cancel()
        http.stop()
        await asyncio.gather(serving, supervising, in_daemon_thread(process.stop), return_exceptions=True)
        context.destroy(linger=0)
    if failure is not None:
        error = failure.error if ready.is_set() else weights.explain(failure.error)
        sys.stderr.write(f"ryzanstein: error: {error}\n")
        return EXIT_USER_ERROR if failure.is_user_error and not ready.is_set() else EXIT_FAILED
    if not stopping.done():
        serving.result()  # the HTTP server ended by itself: raise what ended it
        return EXIT_FAILED
    return EXIT_STOPPED


async def _stop_signal() -> None:
    """Wait for SIGTERM or SIGINT. Later ones change nothing: the end is under way."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()

    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            loop.call_soon_threadsafe(arrived.set)

    if are_stop_signals_ignored():  # one came where nothing can be raised, such as in a finalizer
        return
    # Not the loop's own handlers: between their end and the process's a signal would kill it.
    on_stop_signal(tell)
    await arrived.wait()
