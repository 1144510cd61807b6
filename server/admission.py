"""Which requests go to the engine, and when: the bounded queue between the API and the engine, shared fairly by keys.

The engine gets as many sequences as it takes into a step, and a few more, so that none of its places is free while
somebody waits. All others wait here: what is refused is refused at once, and who leaves leaves nothing behind.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from engine.protocol.messages import FinishReason, Request, TokenOutput
from server.api_keys import ANONYMOUS
from server.departures import Departures
from server.engine_client import EngineClient
from server.errors import APIError, not_ready, timed_out, too_many
from server.fair_queue import FairQueue
from server.flights import Inbox
from server.limits import QueueLimits
from server.metrics.metrics import Metrics
from server.metrics.table import ABORT, QUEUE_FULL


class AdmissionInbox(Inbox):
    """An inbox that tells how many tokens come, and that an error can end without the engine."""

    def __init__(self, on_tokens: Callable[[int], None]) -> None:
        super().__init__()
        self.given_at: float | None = None  # when the engine was given its first sequence, by `time.perf_counter`
        self._on_tokens = on_tokens
        self._error: APIError | None = None

    def put(self, output: TokenOutput) -> None:
        """Add an output of the engine."""
        self._on_tokens(len(output.token_ids))
        super().put(output)

    def fail(self, error: APIError) -> None:
        """Let `take` raise `error` once all that has come is taken."""
        self._error = error
        self._arrived.set()

    async def take(self) -> list[TokenOutput]:
        """Wait until there is something, and return all there is.

        Raises:
            APIError: when the request was ended without the engine.
        """
        outputs = await super().take()
        if self._error is None:
            return outputs
        if not outputs:
            raise self._error
        self._arrived.set()
        return outputs


@dataclass(eq=False)
class _Admission:
    """One API request between its submission and the end of its last sequence."""

    key: str
    arrival: float
    inbox: AdmissionInbox
    waiting: deque[list[Request]]  # by prompt: its choices go together
    begun: float  # waiting, by `time.perf_counter`
    in_engine: set[str] = field(default_factory=set)
    timer: asyncio.TimerHandle | None = None

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens that wait, those of each prompt counted once."""
        return sum(map(_num_prompt_tokens, self.waiting))

    @property
    def waiting_ids(self) -> set[str]:
        """Ids of the sequences that wait."""
        return {request.request_id for choices in self.waiting for request in choices}

    @property
    def is_over(self) -> bool:
        """Whether all of it has ended."""
        return not self.waiting and not self.in_engine

    def cancel_timer(self) -> None:
        """Let no deadline end it any more."""
        if self.timer is not None:
            self.timer.cancel()


class AdmissionQueue:
    """Takes requests as `EngineClient` does, and gives them to it when there is room.

    At any moment each sequence that was submitted and has not ended either waits here or is in the engine, and while
    something waits all places of the engine are taken.

    Args:
        engine: takes what is next.
        metrics: shows what waits.
        limits: of what waits; each of the keys has an equal part, so that none can take the others' room.
        max_num_seqs: how many sequences the engine takes into a step.
        num_keys: how many keys there are, whose names come with requests.
    """

    def __init__(
        self, engine: EngineClient, metrics: Metrics, limits: QueueLimits, max_num_seqs: int, num_keys: int = 1
    ) -> None:
        self.engine = engine
        engine.on_left = self._on_left
        self._metrics = metrics
        self._most_requests = max(1, limits.max_queued_requests // num_keys)
        self._most_tokens = max(1, limits.max_queued_tokens // num_keys)
        self._num_places = max_num_seqs + max(1, max_num_seqs // 8)  # the engine's own queue bridges the way to it
        self._queue: FairQueue[_Admission] = FairQueue()
        self._num_waiting: Counter[str] = Counter()  # requests, by key
        self._num_waiting_tokens: Counter[str] = Counter()
        self._admissions: dict[str, _Admission] = {}  # by the ids of the sequences that have not ended
        self._num_in_engine = 0
        self._departures = Departures()
        metrics.queued_requests.set_function(lambda: len(self._queue))
        metrics.queued_tokens.set_function(self._num_waiting_tokens.total)

    @property
    def num_requests(self) -> int:
        """API requests that were taken and have not ended."""
        return len(set(self._admissions.values()))

    def require_room(self, key: str = ANONYMOUS) -> None:
        """Raise the `APIError` of a request that comes now with `key`, if none can be taken whatever it asks for."""
        self.engine.require_ready()
        if self._num_waiting[key] >= self._most_requests:
            raise self._full(f"{self._num_waiting[key]} requests wait already")

    def submit(
        self,
        requests: Sequence[Request],
        arrival: float,
        key: str = ANONYMOUS,
        deadline: float | None = None,
        inbox: AdmissionInbox | None = None,
    ) -> AdmissionInbox:
        """Take `requests`; their outputs come to the inbox returned.

        Args:
            requests: of one API request; all that remains of it, where it was withdrawn.
            arrival: when that came, by `time.perf_counter`; latencies are measured from then.
            key: name of the API key that it came with.
            deadline: when it ends with an error if it has not ended before, by the same clock.
            inbox: what was returned before they were withdrawn. Such are always taken, and go before those that have
                not begun if they have.

        Raises:
            APIError: (503) when the engine takes no requests, (429) when too many wait, (504) past the deadline.
        """
        self.engine.require_ready()
        now = time.perf_counter()
        if deadline is not None and deadline <= now:
            raise self._late(deadline - arrival)
        prompts = _by_prompt(requests)
        if inbox is None:
            self._require_room_for(key, prompts)
            self._count(key, prompts)
        admission = _Admission(key, arrival, inbox or self._new_inbox(key), prompts, now)
        if deadline is not None:
            loop = asyncio.get_running_loop()
            admission.timer = loop.call_later(deadline - now, self._expire, admission, deadline - arrival)
        self._admissions |= dict.fromkeys((request.request_id for request in requests), admission)
        self._num_waiting[key] += 1
        self._num_waiting_tokens[key] += admission.num_waiting_tokens
        if any(map(_has_begun, requests)):
            self._queue.push_ahead(admission)
        else:
            self._queue.push(key, admission)
        self._fill_places()
        return admission.inbox

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget those of `request_ids` that have not ended."""
        waiting, in_engine = self._take_out(request_ids)
        self._metrics.finished.labels(ABORT).inc(len(waiting))
        self.engine.abort(in_engine)

    def end(self, request_id: str) -> None:
        """Stop a sequence that is complete although the engine would go on.

        It may wait here: what came of it before it was withdrawn may be read after it came back.
        """
        if self._take_out([request_id])[0]:
            self._metrics.finished.labels(FinishReason.STOP.value).inc()
        self.engine.end(request_id)

    def withdraw(self, request_ids: Iterable[str]) -> dict[str, Request]:
        """Take back those of `request_ids` that have not ended; see `EngineClient.withdraw`."""
        waiting, in_engine = self._take_out(request_ids)
        return {request.request_id: request for request in waiting} | self.engine.withdraw(in_engine)

    def forget(self, request_ids: Sequence[str]) -> None:
        """Count withdrawn ones that will not come back as ended."""
        self.engine.forget(request_ids)

    async def close(self, reason: str) -> None:
        """End every request with an error, and take no more."""
        for admission in dict.fromkeys(self._admissions.values()):
            if waiting := self._take_out_waiting(admission, admission.waiting_ids):
                self._metrics.finished.labels(FinishReason.ERROR.value).inc(len(waiting))
                admission.inbox.fail(not_ready(reason))
        await self.engine.close(reason)

    # --- what may come -----------------------------------------------------------------------------------------------

    def _require_room_for(self, key: str, prompts: Iterable[Sequence[Request]]) -> None:
        """Raise an `APIError` if some of `prompts` would have to wait and may not. A key's only request always may."""
        free, num_tokens = self._num_places - self._num_in_engine, 0
        for choices in prompts:
            num_tokens += 0 if free > 0 else _num_prompt_tokens(choices)
            free -= len(choices)
        if not num_tokens or not self._num_waiting[key]:
            return
        self.require_room(key)
        if self._num_waiting_tokens[key] + num_tokens > self._most_tokens:
            raise self._full(f"requests with {self._num_waiting_tokens[key]} prompt tokens wait already")

    def _count(self, key: str, prompts: Iterable[Sequence[Request]]) -> None:
        self._metrics.key_requests.labels(key).inc()
        self._metrics.key_prompt_tokens.labels(key).inc(sum(map(_num_prompt_tokens, prompts)))

    def _full(self, what_waits: str) -> APIError:
        self._metrics.rejected.labels(QUEUE_FULL).inc()
        seconds = self._departures.seconds_until(len(self._queue), time.perf_counter())
        return too_many(f"There is too much to do: {what_waits}.", QUEUE_FULL, seconds)

    def _late(self, seconds: float) -> APIError:
        self._metrics.timed_out.inc()
        return timed_out(seconds)

    def _new_inbox(self, key: str) -> AdmissionInbox:
        metric = self._metrics.key_generation_tokens.labels(key)

        def count(num_tokens: int) -> None:
            metric.inc(num_tokens)
            self._queue.charge(key, num_tokens)

        return AdmissionInbox(count)

    # --- into the engine, and out of it ------------------------------------------------------------------------------

    def _fill_places(self) -> None:
        """Give the engine what is next, as long as there is room."""
        while self._num_in_engine < self._num_places and (admission := self._queue.next()) is not None:
            try:
                self.engine.submit(admission.waiting[0], admission.arrival, admission.inbox, admission.begun)
            except APIError as error:  # it takes none any more
                self._end(admission, error)
            else:
                self._note_given(admission)

    def _note_given(self, admission: _Admission) -> None:
        """Move the next prompt of `admission` from those that wait to those in the engine."""
        now = time.perf_counter()
        if not self._num_in_engine:
            self._departures.begin(now)
        choices = admission.waiting.popleft()
        num_tokens = _num_prompt_tokens(choices)
        admission.inbox.given_at = admission.inbox.given_at or now
        admission.in_engine.update(request.request_id for request in choices)
        self._num_in_engine += len(choices)
        self._num_waiting_tokens[admission.key] -= num_tokens
        if not any(map(_has_begun, choices)):
            self._metrics.admission_time.observe(now - admission.begun)
            self._queue.charge(admission.key, num_tokens)
        self._leave_if_done_waiting(admission)

    def _leave_if_done_waiting(self, admission: _Admission) -> None:
        if not admission.waiting:
            self._queue.remove(admission.key, admission)
            self._num_waiting[admission.key] -= 1

    def _on_left(self, request_id: str) -> None:
        """Take note that a sequence has left the engine, for whatever reason."""
        admission = self._admissions.pop(request_id)
        admission.in_engine.remove(request_id)
        self._num_in_engine -= 1
        if admission.is_over:
            self._departures.add(time.perf_counter())
            admission.cancel_timer()
        self._fill_places()

    # --- ends without the engine -------------------------------------------------------------------------------------

    def _expire(self, admission: _Admission, seconds: float) -> None:
        self._end(admission, self._late(seconds))

    def _end(self, admission: _Admission, error: APIError) -> None:
        """End all that is left of `admission`."""
        waiting = self._take_out_waiting(admission, admission.waiting_ids)
        self._metrics.finished.labels(ABORT).inc(len(waiting))
        admission.inbox.fail(error)
        self.engine.abort(list(admission.in_engine))

    def _take_out(self, request_ids: Iterable[str]) -> tuple[list[Request], list[str]]:
        """Take those of `request_ids` that wait out of the queue; return them, and the ids of those in the engine."""
        known = [request_id for request_id in request_ids if request_id in self._admissions]
        in_engine = [request_id for request_id in known if request_id in self._admissions[request_id].in_engine]
        rest = set(known).difference(in_engine)
        waiting: list[Request] = []
        for admission in dict.fromkeys(self._admissions[request_id] for request_id in known if request_id in rest):
            waiting += self._take_out_waiting(admission, rest)
        return waiting, in_engine

    def _take_out_waiting(self, admission: _Admission, request_ids: AbstractSet[str]) -> list[Request]:
        """Take sequences of `admission` that wait out of the queue, and return them."""
        if not admission.waiting:
            return []
        taken: list[Request] = []
        kept: deque[list[Request]] = deque()
        for choices in admission.waiting:
            taken += (request for request in choices if request.request_id in request_ids)
            if others := [request for request in choices if request.request_id not in request_ids]:
                kept.append(others)
            else:
                self._num_waiting_tokens[admission.key] -= _num_prompt_tokens(choices)
        admission.waiting = kept
        self._leave_if_done_waiting(admission)
        for request in taken:
            del self._admissions[request.request_id]
        if admission.is_over:
            admission.cancel_timer()
        return taken


def _by_prompt(requests: Iterable[Request]) -> deque[list[Request]]:
    """Return the choices of each prompt together; they follow each other, and share its list."""
    prompts: deque[list[Request]] = deque()
    for request in requests:
        if prompts and request.prompt_token_ids is prompts[-1][0].prompt_token_ids:
            prompts[-1].append(request)
        else:
            prompts.append([request])
    return prompts


def _num_prompt_tokens(choices: Sequence[Request]) -> int:
    return len(choices[0].prompt_token_ids)


def _has_begun(request: Request) -> bool:
    return bool(request.received_token_ids or request.num_received_prompt_logprobs)
