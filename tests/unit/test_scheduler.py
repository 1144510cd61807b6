"""The scheduler against ranks that keep tokens in the KV slots, so that every paging mistake changes an output."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.protocol.messages import FinishReason, PromptLogprobs, Request
from engine.scheduler.result import StepResult
from engine.scheduler.scheduler import Scheduler
from tests.unit.scheduler_support import (
    VOCABULARY,
    FakeRank,
    Runner,
    lone_logprobs,
    lone_output,
    lone_prompt_logprobs,
    make_request,
    make_scheduler,
)


def drain(scheduler: Scheduler, *, one_step_late: bool = False) -> dict[str, list[int]]:
    """Run to the end."""
    runner = Runner(scheduler, one_step_late)
    runner.run()
    return {request_id: runner.tokens(request_id) for request_id in runner.outputs}


stems = st.sampled_from([list(range(10, 40)), [3] * 30, []])  # what prompts have in common
tails = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=15)
prompts = st.builds(lambda stem, length, tail: (stem[:length] + tail)[:30], stems, st.integers(0, 30), tails)
asked = st.one_of(st.none(), st.just(0))


@st.composite
def drawn_requests(draw: st.DrawFn) -> list[Request]:
    return [
        make_request(
            str(i),
            draw(prompts),
            draw(st.integers(1, 40)),
            tuple(draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=2))),
            logprobs=draw(asked),
            prompt_logprobs=draw(asked),
        )
        for i in range(draw(st.integers(1, 10)))
    ]


@settings(max_examples=150, deadline=None)
@given(drawn_requests(), st.integers(1, 20), st.integers(1, 6), st.integers(8, 24), st.booleans(), st.booleans())
def test_every_request_gets_what_it_would_get_alone(
    requests: list[Request],
    budget: int,
    max_num_seqs: int,
    num_kv_blocks: int,
    one_step_late: bool,
    enable_prefix_caching: bool,
) -> None:
    scheduler = make_scheduler(
        num_kv_blocks=num_kv_blocks,
        max_model_len=32,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        enable_prefix_caching=enable_prefix_caching,
    )
    for request in requests:
        scheduler.add(request)
    runner = Runner(scheduler, one_step_late)
    runner.run()
    for request in requests:
        expected = lone_output(request, 32)
        assert runner.tokens(request.request_id) == expected
        assert runner.logprobs(request.request_id) == lone_logprobs(request, expected)
        assert runner.prompt_logprobs(request.request_id) == lone_prompt_logprobs(request)
    assert scheduler.take_stats().num_free_kv_blocks == num_kv_blocks


@settings(max_examples=100, deadline=None)
@given(drawn_requests(), st.integers(1, 12), st.booleans(), st.data())
def test_aborts_at_any_moment_leave_the_others_and_the_blocks_whole(
    drawn: list[Request], budget: int, one_step_late: bool, data: st.DataObject
) -> None:
    scheduler = make_scheduler(num_kv_blocks=9, max_model_len=32, max_num_batched_tokens=budget)
    requests = {request.request_id: request for request in drawn}
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
            runner.outputs.pop(victim, None)
            disturbed.discard(victim)
            comebacks -= 1
    assert scheduler.take_stats().num_free_kv_blocks == 9
    for request_id, request in requests.items():
        expected, output = lone_output(request, 32), runner.tokens(request_id)
        assert output == expected[: len(output)]
        assert request_id in disturbed or output == expected
        expected_logprobs, logprobs = lone_prompt_logprobs(request), runner.prompt_logprobs(request_id)
        assert logprobs == expected_logprobs[: len(logprobs)]
        assert request_id in disturbed or logprobs == expected_logprobs


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
        scheduler.apply(step, rank.run(step))


def test_a_long_prompt_is_computed_in_chunks_beside_running_sequences() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    scheduler.add(make_request("short", [1], max_tokens=20))
    rank = FakeRank()
    first = scheduler.schedule()
    assert first is not None
    scheduler.apply(first, rank.run(first))
    scheduler.add(make_request("long", list(range(12)), max_tokens=2))
    chunks = []
    for _ in range(3):
        step = scheduler.schedule()
        assert step is not None
        counts = {row.request_id: row.num_scheduled_tokens for row in step.rows}
        assert counts["short"] == 1
        chunks.append(counts["long"])
        scheduler.apply(step, rank.run(step))
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
    assert scheduler.apply(second, rank.run(second)) == []
    assert not scheduler.has_work
    scheduler.check_integrity()


def test_the_first_output_tells_the_time_in_the_queue() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_request("a", [1], max_tokens=2))
    rank, seconds = FakeRank(), []
    while scheduler.has_work:
        step = scheduler.schedule()
        assert step is not None
        seconds += [output.queue_seconds for output in scheduler.apply(step, rank.run(step))]
    assert seconds == [1.0, None]  # one tick of the clock between arrival and first step


def test_statistics_count_since_the_last_report() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1] * 5, max_tokens=1))
    scheduler.add(make_request("b", [1] * 5, max_tokens=2))
    step = scheduler.schedule()
    assert step is not None
    scheduler.apply(step, FakeRank().run(step))
    stats = scheduler.take_stats()
    assert (stats.num_running, stats.num_waiting, stats.steps) == (1, 0, 1)
    assert (stats.num_kv_blocks, stats.num_free_kv_blocks) == (16, 14)
    assert scheduler.take_stats().steps == 0


def test_prompt_logprobs_come_chunk_by_chunk_and_once_though_the_prompt_is_computed_twice() -> None:
    scheduler = make_scheduler(num_kv_blocks=4, max_model_len=16, max_num_batched_tokens=5)
    old, young = make_request("old", [1, 2], max_tokens=14), make_request("young", [3] * 8, prompt_logprobs=2)
    scheduler.add(old)
    scheduler.add(young)
    runner = Runner(scheduler)
    runner.run()
    assert scheduler.take_stats().preemptions > 0
    assert [row.prompt_logprobs for row in runner.rows("young")][:4] == [
        PromptLogprobs(0, 3, 2),
        PromptLogprobs(3, 7, 2),
        None,
        None,
    ]
    assert runner.prompt_logprobs("young") == lone_prompt_logprobs(young)


def test_a_chunk_that_brings_prompt_logprobs_alone_is_an_output_without_tokens() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=3)
    scheduler.add(make_request("a", [1, 2, 3, 4, 5], max_tokens=1, prompt_logprobs=0, logprobs=0))
    runner = Runner(scheduler)
    runner.run()
    first, last = runner.outputs["a"]
    assert (first.token_ids, first.finish_reason, len(first.prompt_logprobs), first.logprobs) == ([], None, 3, [])
    assert (len(last.token_ids), last.finish_reason, len(last.prompt_logprobs)) == (1, FinishReason.LENGTH, 1)
    assert [logprobs.token_id for logprobs in last.logprobs] == last.token_ids
    assert (first.queue_seconds, first.num_cached_tokens) == (1.0, 0)
    assert (last.queue_seconds, last.num_cached_tokens) == (None, None)


def test_a_prompt_of_one_token_has_no_logprobs() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1], max_tokens=1, prompt_logprobs=5))
    step = scheduler.schedule()
    assert step is not None
    assert step.rows[0].prompt_logprobs is None
