"""The scheduler against ranks that keep tokens in the KV slots, so that every paging mistake changes an output."""

import hashlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.protocol.messages import FinishReason, Request, SamplingParams, ScheduledStep
from engine.scheduler.result import StepResult
from engine.scheduler.scheduler import PENDING_TOKEN, Scheduler

BLOCK_SIZE = 4
VOCABULARY = 50


def next_token(token_ids: list[int]) -> int:
    """A language model: any change of any earlier token changes the next."""
    return hashlib.sha256(repr(token_ids).encode()).digest()[0] % VOCABULARY


def lone_output(request: Request, max_model_len: int) -> list[int]:
    tokens = list(request.prompt_token_ids)
    while len(tokens) < max_model_len and len(tokens) - len(request.prompt_token_ids) < request.sampling.max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in request.sampling.stop_token_ids:
            break
    return tokens[len(request.prompt_token_ids) :]


class FakeRank:
    """Obeys steps as a rank does; the 'KV cache' of a token is the token."""

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}
        self.sequences: dict[str, tuple[list[int], list[int]]] = {}

    def run(self, step: ScheduledStep) -> dict[str, int]:
        for request_id in step.finished:
            del self.sequences[request_id]
        samples = {}
        for row in step.rows:
            if row.is_new:
                self.sequences[row.request_id] = ([], [])
            tokens, blocks = self.sequences[row.request_id]
            assert PENDING_TOKEN not in row.new_token_ids
            tokens.extend(row.new_token_ids)
            blocks.extend(row.new_block_ids)
            stop = row.num_computed_tokens + row.num_scheduled_tokens
            for position in range(row.num_computed_tokens, stop):
                self.slots[self.slot(blocks, position)] = tokens[position]
            if row.samples:
                assert stop == len(tokens)
                samples[row.request_id] = next_token([self.slots[self.slot(blocks, p)] for p in range(stop)])
        return samples

    def slot(self, blocks: list[int], position: int) -> int:
        return blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def make_scheduler(
    *, num_kv_blocks: int = 16, max_model_len: int = 64, max_num_seqs: int = 8, max_num_batched_tokens: int = 64
) -> Scheduler:
    ticks = itertools.count()
    return Scheduler(
        epoch=1,
        num_kv_blocks=num_kv_blocks,
        block_size=BLOCK_SIZE,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        clock=lambda: float(next(ticks)),
    )


def make_request(request_id: str, prompt: list[int], max_tokens: int = 8, stop: tuple[int, ...] = ()) -> Request:
    return Request(request_id, prompt, SamplingParams(max_tokens=max_tokens, stop_token_ids=stop))


class Runner:
    """Runs steps; their results are applied at once, or while the next step is scheduled already."""

    def __init__(self, scheduler: Scheduler, one_step_late: bool = False) -> None:
        self._scheduler = scheduler
        self._rank = FakeRank()
        self._one_step_late = one_step_late
        self._in_flight: tuple[ScheduledStep, dict[str, int]] | None = None
        self.outputs: dict[str, list[int]] = {}
        self.finished: set[str] = set()

    def advance(self) -> bool:
        """Run one step; return whether anything is left."""
        step = self._scheduler.schedule()
        if step is not None and self._in_flight is not None:
            self._scheduler.fill_pending(step, self._in_flight[1])
        self._apply()
        if step is not None:
            assert len(self._scheduler.sampling_rows(step)) == sum(row.samples for row in step.rows)
            self._in_flight = (step, self._rank.run(step))
        if not self._one_step_late:
            self._apply()
        self._scheduler.check_integrity()
        return self._scheduler.has_work or self._in_flight is not None

    def forget(self, request_id: str) -> None:
        self.outputs.pop(request_id, None)
        self.finished.discard(request_id)

    def _apply(self) -> None:
        if self._in_flight is None:
            return
        in_flight, self._in_flight = self._in_flight, None
        for output in self._scheduler.apply(in_flight[0], StepResult(in_flight[1])):
            assert output.request_id not in self.finished, "output after the finish"
            self.outputs.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.finished.add(output.request_id)


def drain(scheduler: Scheduler, *, one_step_late: bool = False) -> dict[str, list[int]]:
    """Run to the end."""
    runner = Runner(scheduler, one_step_late)
    for _ in range(20_000):
        if not runner.advance():
            return runner.outputs
    raise AssertionError("the scheduler does not come to an end")


requests_strategy = st.lists(
    st.tuples(
        st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30),
        st.integers(1, 40),
        st.lists(st.integers(0, VOCABULARY - 1), max_size=2),
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=150, deadline=None)
@given(
    requests_strategy,
    st.integers(1, 20),
    st.integers(1, 6),
    st.integers(8, 24),
    st.booleans(),
)
def test_every_request_gets_what_it_would_get_alone(
    drawn: list[tuple[list[int], int, list[int]]],
    budget: int,
    max_num_seqs: int,
    num_kv_blocks: int,
    one_step_late: bool,
) -> None:
    scheduler = make_scheduler(
        num_kv_blocks=num_kv_blocks, max_model_len=32, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget
    )
    requests = [make_request(str(i), prompt, n, tuple(stop)) for i, (prompt, n, stop) in enumerate(drawn)]
    for request in requests:
        scheduler.add(request)
    outputs = drain(scheduler, one_step_late=one_step_late)
    assert outputs == {request.request_id: lone_output(request, 32) for request in requests}
    assert scheduler.take_stats().num_free_kv_blocks == num_kv_blocks


@settings(max_examples=100, deadline=None)
@given(requests_strategy, st.integers(1, 12), st.booleans(), st.data())
def test_aborts_at_any_moment_leave_the_others_and_the_blocks_whole(
    drawn: list[tuple[list[int], int, list[int]]], budget: int, one_step_late: bool, data: st.DataObject
) -> None:
    scheduler = make_scheduler(num_kv_blocks=9, max_model_len=32, max_num_batched_tokens=budget)
    requests = {str(i): make_request(str(i), prompt, n, tuple(stop)) for i, (prompt, n, stop) in enumerate(drawn)}
    for request in requests.values():
        scheduler.add(request)
    runner = Runner(scheduler, one_step_late)
    disturbed: set[str] = set()
    comebacks = 2
    while runner.advance():
        victim = data.draw(st.sampled_from([*requests, None, None, None]))
        if victim is None:
            continue
        scheduler.abort(victim)  # with one step late, between a step's schedule and its results
        disturbed.add(victim)
        if comebacks and data.draw(st.booleans()):  # the id comes back, as another sequence
            scheduler.add(requests[victim])
            runner.forget(victim)
            disturbed.discard(victim)
            comebacks -= 1
    assert scheduler.take_stats().num_free_kv_blocks == 9
    for request_id, request in requests.items():
        expected, output = lone_output(request, 32), runner.outputs.get(request_id, [])
        assert output == expected[: len(output)]
        assert request_id in disturbed or output == expected


def test_no_step_exceeds_the_token_budget_or_the_number_of_sequences() -> None:
    scheduler = make_scheduler(max_num_seqs=3, max_num_batched_tokens=7)
    for i in range(6):
        scheduler.add(make_request(str(i), [i + 1] * 9))
    rank = FakeRank()
    while scheduler.has_work:
        step = scheduler.schedule()
        assert step is not None
        assert 0 < sum(row.num_scheduled_tokens for row in step.rows) <= 7
        assert len(step.rows) <= 3
        scheduler.apply(step, StepResult(rank.run(step)))


def test_a_long_prompt_is_computed_in_chunks_beside_running_sequences() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    scheduler.add(make_request("short", [1], max_tokens=20))
    rank = FakeRank()
    first = scheduler.schedule()
    assert first is not None
    scheduler.apply(first, StepResult(rank.run(first)))
    scheduler.add(make_request("long", list(range(12)), max_tokens=2))
    chunks = []
    for _ in range(3):
        step = scheduler.schedule()
        assert step is not None
        counts = {row.request_id: row.num_scheduled_tokens for row in step.rows}
        assert counts["short"] == 1
        chunks.append(counts["long"])
        scheduler.apply(step, StepResult(rank.run(step)))
    assert chunks == [5, 5, 2]


def test_running_out_of_blocks_preempts_the_youngest_which_finishes_later() -> None:
    scheduler = make_scheduler(num_kv_blocks=8, max_model_len=32)
    requests = [make_request(str(i), [i] * 10, max_tokens=18) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    outputs = drain(scheduler)
    assert scheduler.take_stats().preemptions > 0
    assert list(outputs) == ["0", "1", "2"]
    assert outputs == {request.request_id: lone_output(request, 32) for request in requests}


def test_a_stop_token_is_emitted_and_ends_the_sequence() -> None:
    request = make_request("a", [3, 4], max_tokens=30)
    stop = lone_output(request, 64)[4]
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [3, 4], max_tokens=30, stop=(stop,)))
    output = drain(scheduler)["a"]
    assert output[-1] == stop
    assert stop not in output[:-1]


def test_a_sequence_ends_at_the_context_length() -> None:
    scheduler = make_scheduler(max_model_len=12)
    scheduler.add(make_request("a", [1] * 9, max_tokens=100))
    assert len(drain(scheduler)["a"]) == 3


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (make_request("a", []), "no tokens"),
        (make_request("a", [1] * 64), "the context holds 64"),
        (make_request("a", [1], max_tokens=0), "max_tokens must be at least 1"),
        (make_request("used", [1]), "already in use"),
    ],
)
def test_a_request_that_can_never_run_is_refused(request_: Request, message: str) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("used", [1]))
    with pytest.raises(ValueError, match=message):
        scheduler.add(request_)


def test_a_cache_that_cannot_hold_one_full_context_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold 64 tokens"):
        make_scheduler(num_kv_blocks=15, max_model_len=64)


def test_a_row_that_could_not_be_sampled_ends_its_request_alone() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("bad", [1]))
    scheduler.add(make_request("good", [2]))
    step = scheduler.schedule()
    assert step is not None
    outputs = scheduler.apply(step, StepResult({"bad": "the logits are not finite", "good": 5}))
    assert outputs[0].finish_reason is FinishReason.ERROR
    assert outputs[0].error == "the logits are not finite"
    assert outputs[1].token_ids == [5]
    assert scheduler.has_work
    scheduler.check_integrity()


def test_a_row_that_could_not_be_sampled_ends_although_its_next_step_is_scheduled() -> None:
    scheduler, rank = make_scheduler(), FakeRank()
    scheduler.add(make_request("bad", [1]))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    rank.run(first)
    scheduler.fill_pending(second, {"bad": "the logits are not finite"})
    assert [output.error for output in scheduler.apply(first, StepResult({"bad": "the logits are not finite"}))] == [
        "the logits are not finite"
    ]
    assert scheduler.apply(second, StepResult(rank.run(second))) == []
    assert not scheduler.has_work
    scheduler.check_integrity()


def test_the_first_output_tells_the_time_in_the_queue() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_request("a", [1], max_tokens=2))
    rank, seconds = FakeRank(), []
    while scheduler.has_work:
        step = scheduler.schedule()
        assert step is not None
        seconds += [output.queue_seconds for output in scheduler.apply(step, StepResult(rank.run(step)))]
    assert seconds == [1.0, None]  # one tick of the clock between arrival and first step


def test_statistics_count_since_the_last_report() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1] * 5, max_tokens=1))
    scheduler.add(make_request("b", [1] * 5, max_tokens=2))
    step = scheduler.schedule()
    assert step is not None
    scheduler.apply(step, StepResult(FakeRank().run(step)))
    stats = scheduler.take_stats()
    assert (stats.num_running, stats.num_waiting, stats.steps) == (1, 0, 1)
    assert (stats.num_kv_blocks, stats.num_free_kv_blocks) == (16, 14)
    assert scheduler.take_stats().steps == 0
