"""The requests in flight: what goes to rank 0, and what comes back, sorted to those who wait for it."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import zmq.asyncio

from engine.protocol.channel import EngineChannel
from engine.protocol.messages import (
    FinishReason,
    GroupState,
    GroupStatus,
    Message,
    Request,
    RequestBatch,
    StatsReport,
    TokenBatch,
    TokenOutput,
)
from server.errors import not_ready
from server.metrics import ABORT, Metrics

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Inbox:
    """Outputs that wait for one API request, all its sequences together."""

    def __init__(self) -> None:
        self._outputs: list[TokenOutput] = []
        self._arrived = asyncio.Event()

    def put(self, output: TokenOutput) -> None:
        """Add an output."""
        self._outputs.append(output)
        self._arrived.set()

    async def take(self) -> list[TokenOutput]:
        """Wait until there is something, and return all there is."""
        await self._arrived.wait()
        self._arrived.clear()
        taken, self._outputs = self._outputs, []
        return taken


@dataclass
class _Flight:
    """One sequence that the engine works on."""

    request: Request
    inbox: Inbox
    arrival: float
    last_token: float | None = None


class EngineClient:
    """The link to the rank group of the present epoch.

    Each sequence that was submitted gets exactly one last output: the engine's, or an error when the group is gone; an
    aborted one gets none any more.
    """

    def __init__(self, context: zmq.asyncio.Context, metrics: Metrics) -> None:
        self.status = GroupStatus(epoch=0, state=GroupState.STARTING)
        self._context = context
        self._metrics = metrics
        self._flights: dict[str, _Flight] = {}
        self._new: list[Request] = []
        self._aborted: list[str] = []
        self._outgoing = asyncio.Event()
        self._channel: EngineChannel | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closed_because = ""
        self._closed = asyncio.Event()
        self._broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def num_in_flight(self) -> int:
        """Sequences that were submitted and have not ended."""
        return len(self._flights)

    def require_ready(self) -> None:
        """Raise an `APIError` (503) unless requests are taken."""
        if self._closed_because:
            raise not_ready(self._closed_because)
        if self.status.state is not GroupState.READY:
            raise not_ready("The model is being loaded; try again in a moment.")

    def submit(self, requests: Sequence[Request], arrival: float) -> Inbox:
        """Send `requests` to the engine with the next message; their outputs come to the inbox returned.

        Args:
            requests: of one API request.
            arrival: when that came, by `time.perf_counter`; latencies are measured from then.

        Raises:
            APIError: when the engine takes no requests.
        """
        self.require_ready()
        inbox = Inbox()
        for request in requests:
            self._flights[request.request_id] = _Flight(request, inbox, arrival)
            if request.sampling.choice_index == 0:  # choices share their prompt
                self._metrics.prompt_tokens.inc(len(request.prompt_token_ids))
        self._new.extend(requests)
        self._outgoing.set()
        return inbox

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget those of `request_ids` that have not ended, and tell the engine."""
        gone = [request_id for request_id in request_ids if self._flights.pop(request_id, None) is not None]
        if gone:
            self._metrics.finished.labels(ABORT).inc(len(gone))
            self._withdraw(gone)

    def end(self, request_id: str) -> None:
        """Stop a sequence that is complete although the engine would go on."""
        flight = self._flights.pop(request_id, None)
        if flight is not None:
            self._metrics.finished.labels(FinishReason.STOP.value).inc()
            self._metrics.e2e_latency.observe(time.perf_counter() - flight.arrival)
            self._withdraw([request_id])

    def _withdraw(self, gone: Sequence[str]) -> None:
        unsent = {request.request_id for request in self._new}.intersection(gone)
        self._new = [request for request in self._new if request.request_id not in unsent]
        self._aborted.extend(request_id for request_id in gone if request_id not in unsent)
        self._outgoing.set()

    def connect(self, status: GroupStatus) -> None:
        """Begin to work with the group that is READY."""
        self.set_status(status)
        self._channel = channel = EngineChannel(self._context, status.epoch, status.engine_endpoint)
        self._tasks = [asyncio.create_task(self._send(channel)), asyncio.create_task(self._receive(channel))]
        for task in self._tasks:
            task.add_done_callback(self._note_end)

    def set_status(self, status: GroupStatus) -> None:
        """Take over what the orchestrator says of the group."""
        self.status = status
        self._metrics.set_status(status)

    async def until_broken(self) -> str:
        """Wait until the link is of no use any more, and return why."""
        return await asyncio.shield(self._broken)

    async def unless_closed(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work` for a request; it is cancelled when none are taken any more.

        Raises:
            APIError: (503) when that is so.
        """
        working, closing = asyncio.ensure_future(work), asyncio.ensure_future(self._closed.wait())
        try:
            await asyncio.wait((working, closing), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                self.require_ready()
            return await working
        finally:
            working.cancel()
            closing.cancel()
            await asyncio.gather(working, closing, return_exceptions=True)

    async def close(self, reason: str) -> None:
        """End every request in flight with an error, and take no more."""
        self._closed_because = self._closed_because or reason
        self._closed.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        flights, self._flights = self._flights, {}
        for request_id, flight in flights.items():
            self._metrics.finished.labels(FinishReason.ERROR.value).inc()
            flight.inbox.put(TokenOutput(request_id, [], FinishReason.ERROR, reason))

    async def _send(self, channel: EngineChannel) -> None:
        """Send what gathered since the last message: all that comes in one turn of the loop goes in one."""
        while True:
            await self._outgoing.wait()
            self._outgoing.clear()
            batch = RequestBatch(channel.epoch, self._new, self._aborted)
            self._new, self._aborted = [], []
            await channel.send(batch)

    async def _receive(self, channel: EngineChannel) -> None:
        while True:
            self._handle(await channel.receive())

    def _note_end(self, task: "asyncio.Task[None]") -> None:
        """Whatever ends one of the link's tasks, nobody may be left waiting for it."""
        error = None if task.cancelled() else task.exception()
        if error is None or self._broken.done():
            return
        logger.error("the link to rank 0 broke", exc_info=error)
        self._broken.set_result(f"the link to rank 0 broke: {error}")

    def _handle(self, message: Message) -> None:
        if isinstance(message, TokenBatch):
            now = time.perf_counter()
            for output in message.outputs:
                self._deliver(output, now)
        elif isinstance(message, StatsReport):
            self._metrics.add_report(message)

    def _deliver(self, output: TokenOutput, now: float) -> None:
        flight = self._flights.get(output.request_id)
        if flight is None:  # aborted a moment ago
            return
        self._measure(flight, output, now)
        if output.finish_reason is not None:
            del self._flights[output.request_id]
        flight.inbox.put(output)

    def _measure(self, flight: _Flight, output: TokenOutput, now: float) -> None:
        metrics = self._metrics
        if output.queue_seconds is not None:
            metrics.queue_time.observe(output.queue_seconds)
        if output.token_ids:
            metrics.generation_tokens.inc(len(output.token_ids))
            if flight.last_token is None:
                metrics.time_to_first_token.observe(now - flight.arrival)
            else:
                metrics.inter_token_latency.observe(now - flight.last_token)
            flight.last_token = now
        if output.finish_reason is not None:
            metrics.finished.labels(output.finish_reason.value).inc()
        if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            metrics.e2e_latency.observe(now - flight.arrival)
