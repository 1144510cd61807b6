"""The server process from a started orchestrator to the exit code: one flat sequence."""

import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import uvloop
import zmq.asyncio

from engine.protocol.affinity import keep_process_on
from engine.protocol.errors import EXIT_FAILED, EXIT_USER_ERROR
from engine.protocol.messages import GroupStatus
from server.admission import AdmissionQueue
from server.app import create_app
from server.banner import announce_ready, listening_url
from server.config import ServerConfig
from server.credentials import Credentials
from server.drain import Drain
from server.engine_client import EngineClient
from server.http_server import HTTPServer
from server.launch import EngineProcess
from server.loading_progress import LoadingProgress
from server.logs import tell
from server.metrics.metrics import Metrics
from server.model_source.sharded_weights import Explanation, ShardedWeights
from server.routes.health import VERSION
from server.service import Service, TextModel
from server.signals import are_stop_signals_ignored, on_stop_signal
from server.streams import StreamStore
from server.supervisor import Supervisor
from server.threads import in_daemon_thread
from server.tracing.base import start_traces

logger = logging.getLogger(__name__)

EXIT_STOPPED = 0
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
    stop = _StopSignals()
    stopping = asyncio.create_task(stop.first.wait())
    hurrying = asyncio.create_task(stop.second.wait())
    context = zmq.asyncio.Context()
    engine = process.spec.engine
    dtype = model.dtype if engine.dtype == "auto" else engine.dtype
    metrics = Metrics(model.name, engine, dtype, keys=credentials.names, vllm_names=config.vllm_metric_names)
    client = EngineClient(context, metrics)
    queue = AdmissionQueue(client, metrics, config, engine.max_num_seqs, len(credentials.names))
    ready = asyncio.Event()
    loading = LoadingProgress(sys.stderr, has_bar=not config.log.is_json)
    url = listening_url(listener, "http" if credentials.tls is None else "https")

    def announce(status: GroupStatus) -> None:
        ready.set()
        keep_process_on(status.service_cpus)
        if stop.first.is_set():  # nobody is to send anything any more
            return
        announce_ready(status, process.spec, model.name, url)
        weights.start_writing()

    streams = StreamStore(config.stream_resume_timeout, config.stream_resume_memory, metrics)
    traces = start_traces(config.otlp_traces_endpoint, model=model.name, version=VERSION)
    service = Service(model, queue, metrics, config, streams, traces=traces)
    metrics.draining.set_function(lambda: float(service.drain.is_draining))
    app = create_app(service, config, credentials)
    http = HTTPServer(app, config, credentials, service.drain, metrics.slow_clients.inc)
    serving = asyncio.create_task(http.serve([listener]))
    supervising = asyncio.create_task(Supervisor(context, process, client, loading.follow, announce).run())
    reason = "The server failed."
    try:
        await asyncio.wait((serving, supervising, stopping), return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            await _drain(service.drain, http, config.drain_timeout, serving, (supervising, hurrying))
        failure = supervising.result() if supervising.done() else None
        reason = STOPPING if failure is None else f"The engine failed: {failure.error}"
    finally:
        await queue.close(reason)
        loading.close()
        for task in (supervising, hurrying):
            task.cancel()
        http.stop()
        await asyncio.gather(serving, supervising, in_daemon_thread(process.stop), return_exceptions=True)
        await traces.close()
        context.destroy(linger=0)
    if failure is not None:
        why = Explanation(failure.error) if ready.is_set() else weights.explain(failure.error)
        tell(logging.ERROR, why.error)
        is_mistake = failure.is_user_error and not ready.is_set() and not why.is_cured
        return EXIT_USER_ERROR if is_mistake else EXIT_FAILED
    if not stopping.done():
        serving.result()  # the HTTP server ended by itself: raise what ended it
        return EXIT_FAILED
    return EXIT_STOPPED


async def _drain(
    drain: Drain, http: HTTPServer, seconds: float, serving: "asyncio.Task[None]", ends: Iterable["asyncio.Task[Any]"]
) -> None:
    """Let the requests in progress finish, for so many seconds or until one of `ends` is done; refuse new ones."""
    drain.begin()
    http.close_when_idle()
    deadline = time.monotonic() + seconds
    if drain.num_requests:
        logger.info("%d requests may take %g s to finish; another signal ends them", drain.num_requests, seconds)
    emptying = asyncio.create_task(drain.until_empty())
    await asyncio.wait((emptying, serving, *ends), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    taking = asyncio.create_task(http.until_taken())
    if emptying.done():
        rest = max(0.0, deadline - time.monotonic())
        await asyncio.wait((taking, serving, *ends), timeout=rest, return_when=asyncio.FIRST_COMPLETED)
    for task in (emptying, taking):
        task.cancel()


class _StopSignals:
    """SIGTERM and SIGINT: the first asks for an end, the second for it at once. Later ones change nothing."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        if not are_stop_signals_ignored():  # one came where nothing can be raised, such as in a finalizer
            # Not the loop's own handlers: between their end and the process's a signal would kill it.
            on_stop_signal(self._tell(self.first), self._tell(self.second))
        else:
            self.first.set()

    def _tell(self, event: asyncio.Event) -> Callable[[], None]:
        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(event.set)

        return tell
