"""The requests in flight: what goes to rank 0, and what comes back, sorted to those who wait for it."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import zmq.asyncio
from msgspec.structs import replace

from engine.protocol.channel import EngineChannel
from engine.protocol.messages import (
    FinishReason,
    GroupState,
    GroupStatus,
    Message,
    Recovery,
    Request,
    RequestBatch,
    StatsReport,
    TokenBatch,
    TokenOutput,
)
from server.errors import not_ready
from server.flights import Flight, Inbox
from server.metrics.metrics import Metrics
from server.metrics.table import ABORT, FIRST_TOKEN
from server.suspects import Suspects

logger = logging.getLogger(__name__)

T = TypeVar("T")

LINK_GRACE_SECONDS = 10.0  # a rank's death cuts the link too, and the orchestrator tells of it once all ranks are gone


def _ignore(request_id: str) -> None:
    """Take no notice of a sequence that left."""


class EngineClient:
    """The link to the rank group of the present epoch.

    Each sequence that was submitted gets exactly one last output: the engine's, or an error; an aborted or withdrawn
    one gets none any more. When a group is lost, the next one is sent all that is in flight, to go on behind what was
    received.

    `on_left` is called with a sequence's id once it is in flight no more, for whatever reason.
    """

    def __init__(self, context: zmq.asyncio.Context, metrics: Metrics) -> None:
        self.status = GroupStatus(epoch=0, state=GroupState.STARTING)
        self.last_recovery: Recovery | None = None
        self.on_left: Callable[[str], None] = _ignore
        self._context = context
        self._metrics = metrics
        self._flights: dict[str, Flight] = {}  # by request id, in order of arrival
        self._waiting: dict[str, Flight] = {}  # those of them that are to be sent, by request id
        self._sent: dict[str, Flight] = {}  # the others, by wire id
        self._aborted: list[str] = []  # wire ids that the engine is to be told of
        self._num_recalls = 0  # times that a sequence was taken back from an engine, or an engine was lost
        self._suspects = Suspects()
        metrics.num_unsent = lambda: len(self._waiting)
        self._outgoing = asyncio.Event()
        self._channel: EngineChannel | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closed_because = ""
        self._closed = asyncio.Event()
        self._broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._resumed_at: float | None = None  # when the group that took over was READY, until its first token comes

    @property
    def num_in_flight(self) -> int:
        """Sequences that were submitted and have neither ended nor been withdrawn."""
        return len(self._flights)

    @property
    def was_ready(self) -> bool:
        """Whether there has been a group that took requests."""
        return self.status.max_model_len > 0

    def require_ready(self) -> None:
        """Raise an `APIError` (503) unless requests are taken."""
        if self._closed_because:
            raise not_ready(self._closed_because)
        if self.status.state is GroupState.FAILED:
            raise not_ready(f"The engine failed: {self.status.error}")
        is_recovering = self.status.state is GroupState.RECOVERING and self.was_ready
        if self.status.state is not GroupState.READY and not is_recovering:
            raise not_ready("The model is being loaded; try again in a moment.")

    # --- sequences ---------------------------------------------------------------------------------------------------

    def submit(
        self, requests: Sequence[Request], arrival: float, inbox: Inbox | None = None, begun: float | None = None
    ) -> Inbox:
        """Send `requests` to the engine with the next message; their outputs come to the inbox returned.

        Args:
            requests: of one API request; also such as `withdraw` returned.
            arrival: when that came, by `time.perf_counter`; latencies are measured from then.
            inbox: where they arrive; a new one when left out.
            begun: when they began to wait for the engine, by the same clock; now when left out.

        Raises:
            APIError: when the engine takes no requests.
        """
        self.require_ready()
        inbox = inbox or Inbox()
        begun = time.perf_counter() if begun is None else begun
        for request in requests:
            flight = Flight(request, inbox, arrival, begun)
            self._flights[request.request_id] = self._waiting[request.request_id] = flight
        self._outgoing.set()
        return inbox

    def withdraw(self, request_ids: Iterable[str]) -> dict[str, Request]:
        """Take those of `request_ids` that have not ended from the engine; return what to submit later in their place.

        That is by request id, and goes on behind all that was received, what nobody took from the inbox included.
        """
        flights = self._take_out(request_ids)
        return {flight.request_id: flight.rest for flight in flights}

    def forget(self, request_ids: Sequence[str]) -> None:
        """Count withdrawn sequences, which will not be submitted again, among the aborted ones."""
        self._metrics.finished.labels(ABORT).inc(len(request_ids))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget those of `request_ids` that have not ended, and tell the engine."""
        if flights := self._take_out(request_ids):
            self._metrics.finished.labels(ABORT).inc(len(flights))

    def end(self, request_id: str) -> None:
        """Stop a sequence that is complete although the engine would go on."""
        for flight in self._take_out([request_id]):
            self._metrics.finished.labels(FinishReason.STOP.value).inc()
            self._measure_whole(flight, time.perf_counter())

    def _take_out(self, request_ids: Iterable[str]) -> list[Flight]:
        """Remove flights, and tell the engine."""
        flights = []
        for request_id in list(request_ids):
            flight = self._flights.get(request_id)
            if flight is not None:
                flights.append(flight)
                self._recall(flight)
                self._leave(flight)  # who hears of it may take out others
        return flights

    def _recall(self, flight: Flight) -> None:
        """Have the engine drop a flight; it knows it by another id if it is to see it again."""
        if flight.wire_id:
            del self._sent[flight.wire_id]
            self._aborted.append(flight.wire_id)
            self._num_recalls += 1
            flight.wire_id = ""
            self._outgoing.set()

    def _leave(self, flight: Flight) -> None:
        """Remove a flight from all that is known of any."""
        del self._flights[flight.request_id]
        self._waiting.pop(flight.request_id, None)
        self._sent.pop(flight.wire_id, None)
        if flight is self._suspects.on_trial:
            self._outgoing.set()  # it held up others
        self._suspects.clear(flight)
        self.on_left(flight.request_id)
        if not self._flights:  # nor did one come from the queue: the next token is not what the recovery held up
            self._resumed_at = None

    def _end_with_error(self, flight: Flight, message: str) -> None:
        self._metrics.finished.labels(FinishReason.ERROR.value).inc()
        flight.inbox.put(TokenOutput(flight.request_id, [], FinishReason.ERROR, message))
        self._leave(flight)

    # --- groups ------------------------------------------------------------------------------------------------------

    def connect(self, status: GroupStatus) -> None:
        """Begin to work with the group that is READY: it is sent all that is in flight."""
        if self._channel is not None:
            self._disconnect()
        self.set_status(status)
        if status.recovery is not None:
            self._note_recovered(status.recovery)
        self._channel = channel = EngineChannel(self._context, status.epoch, status.engine_endpoint)
        works = self._send(channel), self._receive(channel), self._watch(channel)
        self._tasks = [asyncio.create_task(work) for work in works]
        for task in self._tasks:
            task.add_done_callback(self._note_end)
        self._outgoing.set()

    def lose(self, status: GroupStatus) -> bool:
        """The group is lost, and another is being started, as `status` says; return whether it brought something.

        That is a token, or that the request was found that kills its ranks. That one ends with an error.
        """
        assert status.recovery is not None
        recovery, by_wire_id = status.recovery, self._sent
        self._disconnect()
        self.set_status(status)
        self.last_recovery = recovery
        self._metrics.recoveries.labels(recovery.kind).inc()
        had_progress = self._suspects.has_progressed
        culprit = self._suspects.note_loss([by_wire_id[name] for name in recovery.in_step if name in by_wire_id])
        if culprit is not None:
            logger.error("request %s, computed alone, ends its ranks again: %s", culprit.request_id, recovery.cause)
            self._end_with_error(culprit, f"The engine does not survive this request, computed alone: {recovery.cause}")
        return had_progress or culprit is not None

    def set_status(self, status: GroupStatus) -> None:
        """Take over what the orchestrator says of the group; limits of the last one hold while there is none."""
        if status.state is not GroupState.READY:
            before = self.status
            status = replace(status, max_model_len=before.max_model_len, num_kv_blocks=before.num_kv_blocks)
        self.status = status
        self._metrics.set_status(status)

    async def until_broken(self) -> str:
        """Wait until the link is of no use any more although nobody said that the group is lost; return why."""
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
        tasks = self._tasks
        self._disconnect()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._flights:
            self._end_with_error(next(iter(self._flights.values())), reason)

    def _disconnect(self) -> None:
        """Drop the link; what is in flight waits for the next."""
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._broken.done():
            self._broken = asyncio.get_running_loop().create_future()
        self._num_recalls += 1
        self._aborted = []
        self._sent = {}
        self._waiting = dict(self._flights)
        for flight in self._waiting.values():
            flight.wire_id = ""

    def _note_recovered(self, recovery: Recovery) -> None:
        self.last_recovery = recovery
        self._resumed_at = time.perf_counter() if self._flights else None
        for phase, seconds in recovery.seconds.items():
            self._metrics.recovery_seconds.labels(phase).observe(seconds)

    # --- the link ----------------------------------------------------------------------------------------------------

    async def _send(self, channel: EngineChannel) -> None:
        """Send what gathered since the last message: all that comes in one turn of the loop goes in one."""
        while True:
            await self._outgoing.wait()
            self._outgoing.clear()
            new = [self._send_off(flight) for flight in self._choose()]
            aborted, self._aborted = self._aborted, []
            if new or aborted:
                await channel.send(RequestBatch(channel.epoch, new, aborted))

    def _choose(self) -> list[Flight]:
        """Return those that may be sent now: all that wait, or the one that has to run alone."""
        alone = self._suspects.on_trial
        if alone is None:
            return list(self._waiting.values())
        return [alone] if alone.request_id in self._waiting else []

    def _send_off(self, flight: Flight) -> Request:
        del self._waiting[flight.request_id]
        wire_id = f"{flight.request_id}~{self._num_recalls}" if self._num_recalls else flight.request_id
        self._sent[wire_id] = flight
        flight.sent = time.perf_counter()
        return flight.send_as(wire_id)

    async def _receive(self, channel: EngineChannel) -> None:
        while True:
            self._handle(await channel.receive())

    async def _watch(self, channel: EngineChannel) -> None:
        """End when the link was cut and nobody says that the group is lost."""
        await channel.until_cut()
        await asyncio.sleep(LINK_GRACE_SECONDS)
        raise ConnectionResetError("it was cut")

    def _note_end(self, task: "asyncio.Task[None]") -> None:
        """Whatever ends one of the link's tasks, nobody may be left waiting for it."""
        error = None if task.cancelled() else task.exception()
        if error is None or self._broken.done() or task not in self._tasks:
            return
        logger.error("the link to rank 0 broke", exc_info=None if isinstance(error, ConnectionResetError) else error)
        self._broken.set_result(f"the link to rank 0 broke: {error}")

    def _handle(self, message: Message) -> None:
        if isinstance(message, TokenBatch):
            now = time.perf_counter()
            for output in message.outputs:
                self._deliver(output, now)
        elif isinstance(message, StatsReport):
            self._metrics.add_report(message)

    def _deliver(self, output: TokenOutput, now: float) -> None:
        flight = self._sent.get(output.request_id)
        if flight is None:  # it was aborted a moment ago
            return
        had_begun, had_tokens = flight.has_begun, bool(flight.token_ids)
        output = flight.take(output)
        if not had_begun and flight.request.sampling.choice_index == 0:  # choices share their prompt
            self._metrics.prompt_tokens.inc(len(flight.request.prompt_token_ids))
            self._metrics.prompt_lengths.observe(len(flight.request.prompt_token_ids))
        self._measure(flight, output, now, had_tokens=had_tokens)
        if output.token_ids:
            self._note_token(flight, now)
        flight.inbox.put(output)
        if output.finish_reason is not None:
            self._leave(flight)

    def _note_token(self, flight: Flight, now: float) -> None:
        """A sequence that was on trial has passed; if others are to be tried, it waits until they have."""
        was_on_trial = flight is self._suspects.on_trial
        self._suspects.note_token(flight)
        if was_on_trial:
            if self._suspects.on_trial is not None:
                self._recall(flight)
                self._waiting[flight.request_id] = flight
            self._outgoing.set()
        if self._resumed_at is not None:
            self._metrics.recovery_seconds.labels(FIRST_TOKEN).observe(now - self._resumed_at)
            self._resumed_at = None

    def _measure(self, flight: Flight, output: TokenOutput, now: float, *, had_tokens: bool) -> None:
        metrics = self._metrics
        if output.queue_seconds is not None:
            metrics.queue_time.observe(output.queue_seconds)
            flight.first_step = flight.sent + output.queue_seconds
            metrics.wait_time.observe(flight.first_step - flight.begun)
        if output.token_ids:
            metrics.generation_tokens.inc(len(output.token_ids))
            if flight.last_token is not None:
                metrics.inter_token_latency.observe(now - flight.last_token)
            elif not had_tokens:
                metrics.time_to_first_token.observe(now - flight.arrival)
                flight.first_token = now
                if flight.first_step is not None:
                    metrics.prefill_time.observe(now - flight.first_step)
            flight.last_token = now
        if output.finish_reason is not None:
            metrics.finished.labels(output.finish_reason.value).inc()
        if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._measure_whole(flight, now)

    def _measure_whole(self, flight: Flight, now: float) -> None:
        """A sequence has come to its end."""
        metrics, num_tokens = self._metrics, len(flight.token_ids)
        metrics.e2e_latency.observe(now - flight.arrival)
        metrics.generation_lengths.observe(num_tokens)
        if flight.first_token is not None and flight.last_token is not None:
            seconds = flight.last_token - flight.first_token
            metrics.decode_time.observe(seconds)
            if num_tokens > 1:
                metrics.time_per_output_token.observe(seconds / (num_tokens - 1))
