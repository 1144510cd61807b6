"""The queue between the API and the engine: against a model of its bookkeeping, and what is promised of each end."""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.protocol.messages import FinishReason, Request, SamplingParams, TokenOutput
from server.admission import AdmissionInbox, AdmissionQueue
from server.api_keys import ANONYMOUS
from server.engine_client import EngineClient
from server.errors import APIError, not_ready
from server.flights import Inbox
from server.limits import QueueLimits
from server.metrics.metrics import Metrics
from tests.metric_samples import value_of

LONG = 1000.0  # seconds


class Engine:
    """What the queue sees of `EngineClient`; its sequences end when a test says so."""

    def __init__(self) -> None:
        self.on_left: Callable[[str], None]
        self.flights: dict[str, tuple[Request, Inbox]] = {}
        self.begun: list[str] = []  # in the order in which they came
        self.closed_because = ""

    def require_ready(self) -> None:
        if self.closed_because:
            raise not_ready(self.closed_because)

    def submit(self, requests: Sequence[Request], _: float, inbox: Inbox, __: float) -> None:
        self.require_ready()
        for request in requests:
            assert request.request_id not in self.flights
            self.flights[request.request_id] = request, inbox
            self.begun.append(request.request_id)

    def put(self, output: TokenOutput) -> None:
        inbox = self.flights[output.request_id][1]
        if output.finish_reason is not None:
            del self.flights[output.request_id]
        inbox.put(output)
        if output.finish_reason is not None:
            self.on_left(output.request_id)

    def emit(self, request_id: str, num_tokens: int) -> None:
        self.put(TokenOutput(request_id, [1] * num_tokens))

    def finish(self, request_id: str) -> None:
        self.put(TokenOutput(request_id, [2], FinishReason.STOP))

    def abort(self, request_ids: Iterable[str]) -> None:
        self.withdraw(request_ids)

    def end(self, request_id: str) -> None:
        self.withdraw([request_id])

    def withdraw(self, request_ids: Iterable[str]) -> dict[str, Request]:
        found = {request_id: self.flights[request_id][0] for request_id in request_ids if request_id in self.flights}
        for request_id in found:
            del self.flights[request_id]
            self.on_left(request_id)
        return found

    async def close(self, reason: str) -> None:
        self.closed_because = reason
        for request_id in list(self.flights):
            self.put(TokenOutput(request_id, [], FinishReason.ERROR, reason))


class ManualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time stands still until a test moves it."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def call(self, action: Callable[[], None]) -> None:
        """Run `action`, and what is due."""

        async def run() -> None:
            action()
            for _ in range(3):
                await asyncio.sleep(0)

        self.run_until_complete(run())


def make(
    engine: Engine, metrics: Metrics | None = None, max_num_seqs: int = 2, num_keys: int = 1, **limits: int
) -> AdmissionQueue:
    """Return a queue before an engine with one place more than `max_num_seqs`."""
    client = cast("EngineClient", engine)
    return AdmissionQueue(client, metrics or Metrics(), QueueLimits(**limits), max_num_seqs, num_keys)


def sequences(name: str, num_tokens: int = 1, num_choices: int = 1, num_prompts: int = 1) -> list[Request]:
    prompts = [[number] * num_tokens for number in range(num_prompts)]
    pairs = [(prompt, choice) for prompt in prompts for choice in range(num_choices)]
    return [
        Request(f"{name}-{index}", prompt, SamplingParams(max_tokens=9, choice_index=choice))
        for index, (prompt, choice) in enumerate(pairs)
    ]


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return value_of(metrics, f"ryzanstein_{name}", **labels) or 0.0


class Bookkeeping(RuleBasedStateMachine):
    """Any order of everything that can happen; what waits is told from what is open and not in the engine."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = ManualLoop()
        self.engine, self.metrics = Engine(), Metrics()
        self.open: dict[str, tuple[int, str, Request]] = {}  # by sequence: API request, key
        self.inboxes: dict[int, AdmissionInbox] = {}
        self.withdrawn: dict[int, tuple[str, list[Request]]] = {}
        self.has_deadline: set[int] = set()
        self.came: dict[str, list[str]] = {"a": [], "b": []}  # by key: sequences in order of arrival
        self.num_taken = 0

    @initialize(max_num_seqs=st.integers(1, 9), max_requests=st.integers(1, 8), max_tokens=st.integers(1, 60))
    def begin(self, max_num_seqs: int, max_requests: int, max_tokens: int) -> None:
        self.places = max_num_seqs + 1  # as many as up to 15 have
        self.limits = max(1, max_requests // 2), max(1, max_tokens // 2)  # of each key
        limits = {"max_queued_requests": max_requests, "max_queued_tokens": max_tokens}
        self.queue = make(self.engine, self.metrics, max_num_seqs, num_keys=2, **limits)

    def waiting(self, keys: str = "ab") -> dict[int, dict[int, int]]:
        """Return what waits: by API request, the length of each of its prompts, by the prompt's number."""
        found: dict[int, dict[int, int]] = {}
        for request_id, (number, key, request) in self.open.items():
            if key in keys and request_id not in self.engine.flights:
                prompt = request.prompt_token_ids
                found.setdefault(number, {})[prompt[0]] = len(prompt)
        return found

    def num_waiting_tokens(self, keys: str = "ab") -> int:
        return sum(sum(prompts.values()) for prompts in self.waiting(keys).values())

    @rule(
        key=st.sampled_from("ab"),
        num_tokens=st.integers(1, 12),
        num_choices=st.integers(1, 3),
        num_prompts=st.integers(1, 3),
        has_deadline=st.booleans(),
    )
    def submit(self, key: str, num_tokens: int, num_choices: int, num_prompts: int, has_deadline: bool) -> None:
        number = self.num_taken
        requests = sequences(f"r{number}", num_tokens, num_choices, num_prompts)
        num_waiting, num_waiting_tokens = len(self.waiting(key)), self.num_waiting_tokens(key)
        deadline = time.perf_counter() + LONG if has_deadline else None
        try:
            self.loop.call(lambda: self.take(number, self.queue.submit(requests, 0.0, key, deadline)))
        except APIError as error:
            self.check_refusal(error, num_waiting, num_waiting_tokens + num_tokens * num_prompts)
            return
        self.num_taken += 1
        self.open |= {request.request_id: (number, key, request) for request in requests}
        self.came[key] += [request.request_id for request in requests]
        if has_deadline:
            self.has_deadline.add(number)
        rest = self.waiting().get(number)
        if rest and num_waiting:
            assert num_waiting < self.limits[0]
            assert num_waiting_tokens + sum(rest.values()) <= self.limits[1]

    def check_refusal(self, error: APIError, num_waiting: int, num_tokens: int) -> None:
        """Check that there was reason to refuse a request, with which so many tokens would have waited."""
        most_requests, most_tokens = self.limits
        assert error.status == 429
        assert (error.retry_after or 0) >= 1
        assert num_waiting
        assert num_waiting >= most_requests or num_tokens > most_tokens

    def take(self, number: int, inbox: AdmissionInbox) -> None:
        self.inboxes[number] = inbox

    def chosen(self, data: st.DataObject, ids: Iterable[str]) -> list[str]:
        """Return some of `ids`."""
        known = list(ids)
        return data.draw(st.lists(st.sampled_from(known), unique=True, max_size=5)) if known else []

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        for request_id in self.chosen(data, self.engine.flights):
            del self.open[request_id]
            self.engine.finish(request_id)

    @rule(data=st.data())
    def emit(self, data: st.DataObject) -> None:
        for request_id in self.chosen(data, self.engine.flights):
            self.engine.emit(request_id, 3)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        gone = self.chosen(data, self.open)
        for request_id in gone:
            del self.open[request_id]
        self.queue.abort([*gone, "never heard of"])

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        for request_id in self.chosen(data, self.open)[:1]:
            del self.open[request_id]
            self.queue.end(request_id)

    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        numbers = sorted({number for number, _, _ in self.open.values()})
        if not numbers:
            return
        number = data.draw(st.sampled_from(numbers))
        mine = {request_id: entry for request_id, entry in self.open.items() if entry[0] == number}
        begun = set(self.engine.flights)
        back = self.queue.withdraw(mine)
        assert back.keys() == mine.keys()
        for request_id in mine:
            del self.open[request_id]
        key = next(iter(mine.values()))[1]
        self.came[key] = [request_id for request_id in self.came[key] if request_id not in mine]
        resumed = [
            Request(request.request_id, request.prompt_token_ids, request.sampling, [7] * (request.request_id in begun))
            for request in back.values()
        ]
        self.withdrawn[number] = key, sorted(resumed, key=lambda request: int(request.request_id.split("-")[1]))

    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        if not self.withdrawn:
            return
        number = data.draw(st.sampled_from(sorted(self.withdrawn)))
        key, requests = self.withdrawn.pop(number)
        self.queue.submit(requests, 0.0, key, inbox=self.inboxes[number])
        self.open |= {request.request_id: (number, key, request) for request in requests}
        self.has_deadline.discard(number)

    @rule()
    def let_time_pass(self) -> None:
        late = {number for number, _, _ in self.open.values()} & self.has_deadline
        self.open = {request_id: entry for request_id, entry in self.open.items() if entry[0] not in late}
        self.loop.now += 2 * LONG
        self.loop.call(lambda: None)
        for number in late:
            assert self.error_of(number).status == 504

    def error_of(self, number: int) -> APIError:
        """Return what ends an API request after all its outputs."""

        async def read() -> None:
            while True:
                await self.inboxes[number].take()

        with pytest.raises(APIError) as caught:
            self.loop.run_until_complete(read())
        return caught.value

    @invariant()
    def nothing_is_lost_and_nothing_left_over(self) -> None:
        if self.num_taken:
            assert self.engine.flights.keys() <= self.open.keys()
            assert self.queue.num_requests == len({number for number, _, _ in self.open.values()})
            assert value(self.metrics, "queued_requests") == len(self.waiting())
            assert value(self.metrics, "queued_tokens") == self.num_waiting_tokens()

    @invariant()
    def nobody_waits_for_a_free_place(self) -> None:
        if self.num_taken:
            assert not self.waiting() or len(self.engine.flights) >= self.places

    @invariant()
    def those_of_a_key_begin_in_their_order(self) -> None:
        place = {request_id: index for index, request_id in enumerate(self.engine.begun)}
        for ids in self.came.values():
            order = [place[request_id] for request_id in ids if request_id in place]
            assert order == sorted(order)

    def teardown(self) -> None:
        while self.engine.flights:
            for request_id in list(self.engine.flights):
                self.open.pop(request_id)
                self.engine.finish(request_id)
        assert self.open == {}
        if self.num_taken:
            assert self.queue.num_requests == value(self.metrics, "queued_requests") == 0
            assert value(self.metrics, "queued_tokens") == 0
            self.loop.now += 2 * LONG
            self.loop.call(lambda: None)
            assert value(self.metrics, "requests_timed_out_total") <= len(self.has_deadline)
        self.loop.close()


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(max_examples=100, stateful_step_count=30)


@contextmanager
def refused(status: int, code: str) -> Iterator[None]:
    with pytest.raises(APIError) as caught:
        yield
    assert (caught.value.status, caught.value.code) == (status, code)


def test_choices_of_a_prompt_go_together_and_prompts_of_a_request_one_by_one() -> None:
    engine = Engine()
    queue = make(engine)  # 3 places
    queue.submit(sequences("r", num_choices=2, num_prompts=3), 0.0)
    assert list(engine.flights) == ["r-0", "r-1", "r-2", "r-3"]
    engine.finish("r-0")
    assert len(engine.flights) == 3
    engine.finish("r-2")
    assert list(engine.flights) == ["r-1", "r-3", "r-4", "r-5"]


def test_what_had_begun_goes_before_what_waits_and_is_never_refused() -> None:
    engine = Engine()
    queue = make(engine, max_queued_requests=1)
    inbox = queue.submit(sequences("first", num_choices=3), 0.0)
    back = queue.withdraw(["first-0", "first-1", "first-2"])
    queue.submit(sequences("crowd", num_choices=3), 0.0)
    queue.submit(sequences("waiting"), 0.0)
    with refused(429, "queue_full"):
        queue.submit(sequences("refused"), 0.0)
    begun = [Request(name, request.prompt_token_ids, request.sampling, [5]) for name, request in back.items()]
    queue.submit(begun, 0.0, inbox=inbox)
    for request_id in ("crowd-0", "crowd-1", "crowd-2"):
        engine.finish(request_id)
    assert list(engine.flights) == ["first-0", "first-1", "first-2"]
    engine.finish("first-0")
    assert "waiting-0" in engine.flights


def test_what_is_found_complete_while_it_waits_again_never_comes_to_the_engine() -> None:
    engine, metrics = Engine(), Metrics()
    queue = make(engine, metrics)
    inbox = queue.submit(sequences("cut"), 0.0)
    engine.emit("cut-0", 3)  # with a stop string, which nobody has read yet
    back = queue.withdraw(["cut-0"])
    queue.submit(sequences("crowd", num_choices=3), 0.0)
    queue.submit(list(back.values()), 0.0, inbox=inbox)
    queue.end("cut-0")
    assert queue.num_requests == 1
    assert value(metrics, "request_success_total", finished_reason="stop") == 1
    engine.finish("crowd-0")
    assert list(engine.flights) == ["crowd-1", "crowd-2"]


def test_a_prompt_larger_than_the_bound_waits_where_nothing_else_does() -> None:
    engine = Engine()
    queue = make(engine, max_queued_tokens=10)
    queue.submit(sequences("running", num_choices=3), 0.0)
    queue.submit(sequences("large", num_tokens=50), 0.0)
    with refused(429, "queue_full"):
        queue.submit(sequences("small"), 0.0)
    engine.finish("running-0")
    assert "large-0" in engine.flights
    queue.submit(sequences("small"), 0.0)


def test_refusals_are_counted_and_say_when_to_come_again() -> None:
    engine, metrics = Engine(), Metrics()
    queue = make(engine, metrics, max_queued_requests=1)
    queue.submit(sequences("running", num_choices=3), 0.0)
    queue.submit(sequences("waiting"), 0.0)
    for attempt in (lambda: queue.submit(sequences("late"), 0.0), queue.require_room):
        with pytest.raises(APIError) as caught:
            attempt()
        assert caught.value.type == "rate_limit_error"
        assert int(caught.value.response().headers["retry-after"]) >= 1
    assert value(metrics, "requests_rejected_total", reason="queue_full") == 2


def test_what_a_key_had_is_counted_by_its_name() -> None:
    engine, metrics = Engine(), Metrics()
    queue = make(engine, metrics)
    queue.submit(sequences("r", num_tokens=5, num_choices=2), 0.0, "team-a")
    engine.emit("r-0", 4)
    engine.finish("r-1")
    counted = [
        value(metrics, f"key_{name}_total", key="team-a") for name in ("requests", "prompt_tokens", "generation_tokens")
    ]
    assert counted == [1, 5, 5]
    queue.submit(sequences("s"), 0.0)
    assert value(metrics, "key_requests_total", key=ANONYMOUS) == 1


def test_a_key_that_takes_all_the_room_it_may_leaves_the_others_theirs() -> None:
    queue = make(Engine(), max_num_seqs=1, num_keys=3, max_queued_requests=6, max_queued_tokens=300)
    for index in range(2 + 2):  # two are in the engine, two wait
        queue.submit(sequences(f"a{index}"), 0.0, "a")
    with refused(429, "queue_full"):
        queue.submit(sequences("a4"), 0.0, "a")
    with refused(429, "queue_full"):
        queue.require_room("a")
    queue.require_room("b")
    queue.submit(sequences("b0", num_tokens=60), 0.0, "b")
    with refused(429, "queue_full"):
        queue.submit(sequences("b1", num_tokens=41), 0.0, "b")
    queue.submit(sequences("b2", num_tokens=40), 0.0, "b")
    queue.submit(sequences("c0"), 0.0, "c")


def test_a_key_with_one_request_does_not_wait_behind_all_of_another_key() -> None:
    engine = Engine()
    queue = make(engine)
    for number in range(50):
        queue.submit(sequences(f"crowd{number}", num_tokens=10), 0.0, "crowd")
    queue.submit(sequences("one", num_tokens=10), 0.0, "one")
    for request_id in list(engine.flights):
        engine.finish(request_id)
    assert "one-0" in engine.flights


def test_a_prompt_is_charged_when_it_begins() -> None:
    engine = Engine()
    queue = make(engine, max_num_seqs=1)  # 2 places
    for number in range(4):
        queue.submit(sequences(f"a{number}", num_tokens=100), 0.0, "a")
        queue.submit(sequences(f"b{number}"), 0.0, "b")
    for request_id in ("a0-0", "b0-0", "b1-0", "b2-0"):
        engine.finish(request_id)
    assert engine.begun == ["a0-0", "b0-0", "b1-0", "b2-0", "b3-0", "a1-0"]


def test_tokens_are_charged_as_they_are_generated() -> None:
    engine = Engine()
    queue = make(engine, max_num_seqs=1)  # 2 places
    for number in range(4):
        queue.submit(sequences(f"a{number}"), 0.0, "a")
        queue.submit(sequences(f"b{number}"), 0.0, "b")
    engine.emit("a0-0", 100)
    for request_id in ("a0-0", "b0-0", "b1-0", "b2-0"):
        engine.finish(request_id)
    assert list(engine.flights) == ["b3-0", "a1-0"]


def test_a_deadline_that_has_passed_is_refused_at_once() -> None:
    metrics = Metrics()
    queue = make(Engine(), metrics)
    with refused(504, "timeout"):
        queue.submit(sequences("r"), time.perf_counter() - 2, deadline=time.perf_counter() - 1)
    assert value(metrics, "requests_timed_out_total") == 1
    assert queue.num_requests == 0


def test_closing_ends_what_waits_and_what_is_in_the_engine_once_each() -> None:
    async def run() -> None:
        engine = Engine()
        queue = make(engine)
        running = queue.submit(sequences("running", num_choices=3), 0.0)
        waiting = queue.submit(sequences("waiting"), 0.0)
        await queue.close("The server is shutting down.")
        outputs = await running.take()
        assert [output.finish_reason for output in outputs] == [FinishReason.ERROR] * 3
        with refused(503, "engine_not_ready"):
            await waiting.take()
        assert engine.begun == ["running-0", "running-1", "running-2"]
        assert queue.num_requests == 0

    asyncio.run(run())


def test_what_came_before_a_deadline_is_taken_before_its_error() -> None:
    async def run() -> None:
        engine = Engine()
        queue = make(engine)
        inbox = queue.submit(sequences("r"), time.perf_counter(), deadline=time.perf_counter() + 1)
        engine.emit("r-0", 2)
        while engine.flights:
            await asyncio.sleep(0)
        assert [output.token_ids for output in await inbox.take()] == [[1, 1]]
        with refused(504, "timeout"):
            await inbox.take()

    asyncio.run(run())


def test_an_engine_that_takes_no_more_ends_what_waits_for_it() -> None:
    async def run() -> None:
        engine = Engine()
        queue = make(engine)
        queue.submit(sequences("running", num_choices=3), 0.0)
        waiting = [queue.submit(sequences(f"w{number}"), 0.0) for number in range(5)]
        engine.closed_because = "gone"
        engine.finish("running-0")
        for inbox in waiting:
            with refused(503, "engine_not_ready"):
                await inbox.take()
        assert queue.num_requests == 1

    asyncio.run(run())
