"""The scheduler against ranks that keep tokens in the KV slots, so that every paging mistake changes an output."""

from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.protocol.messages import FinishReason, HistogramDelta, PromptLogprobs, Request
from engine.protocol.stats import BATCH_SIZE_BUCKETS, STEP_TOKENS_BUCKETS
from engine.sampling.row import SamplingRow
from tests.unit.scheduler_support import (
    EPOCH,
    FakeRank,
    Runner,
    drawn_requests,
    lone_logprobs,
    lone_output,
    lone_prompt_logprobs,
    make_request,
    make_scheduler,
)


@settings(max_examples=150)
@given(
    drawn_requests(),
    st.lists(st.integers(0, 5), min_size=1, max_size=8),
    st.integers(1, 20),
    st.integers(1, 6),
    st.integers(8, 24),
    st.booleans(),
    st.booleans(),
)
def test_every_request_gets_what_it_would_get_alone(
    requests: list[Request],
    pauses: list[int],
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
    runner = Runner(scheduler, one_step_late)
    for request, num_steps in zip(requests, cycle(pauses), strict=False):
        scheduler.add(request)
        for _ in range(num_steps):
            runner.advance()
    runner.run()
    for request in requests:
        expected = lone_output(request, 32)
        assert runner.tokens(request.request_id) == expected
        assert runner.logprobs(request.request_id) == lone_logprobs(request, expected)
        assert runner.prompt_logprobs(request.request_id) == lone_prompt_logprobs(request)
    assert scheduler.take_stats().num_free_kv_blocks == num_kv_blocks


@settings(max_examples=100)
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


def test_a_step_carries_its_number_and_the_epoch() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1]))
    runner = Runner(scheduler)
    runner.run()
    assert [(step.epoch, step.step) for step in runner.steps] == [(EPOCH, i) for i in range(8)]


def test_rows_are_sampled_with_their_own_parameters_and_tokens() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    first, chunked = make_request("first", [1, 2]), make_request("chunked", [3] * 9)
    scheduler.add(first)
    scheduler.add(chunked)
    runner = Runner(scheduler)
    runner.advance()
    step = scheduler.schedule()
    assert step is not None
    tokens = runner.tokens("first")
    assert scheduler.sampling_rows(step) == [
        SamplingRow(first.sampling, [1, 2, *tokens], 2),
        SamplingRow(chunked.sampling, [3] * 9, 9),
    ]


def test_without_work_there_is_no_step() -> None:
    scheduler = make_scheduler()
    assert not scheduler.has_work
    assert scheduler.schedule() is None


def test_a_sequence_is_admitted_to_the_last_token_of_the_budget_and_the_last_seat() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4, max_num_seqs=2)
    for i in range(3):
        scheduler.add(make_request(str(i), [i] * 3))
    step = scheduler.schedule()
    assert step is not None
    assert [(row.request_id, row.num_scheduled_tokens) for row in step.rows] == [("0", 3), ("1", 1)]


@pytest.mark.parametrize(("num_kv_blocks", "admitted"), [(4, ["0", "1"]), (5, ["0", "1", "2"])])
def test_a_sequence_is_admitted_only_if_each_running_one_can_grow_by_a_block(
    num_kv_blocks: int, admitted: list[str]
) -> None:
    scheduler = make_scheduler(num_kv_blocks=num_kv_blocks, max_model_len=16)
    for i in range(3):
        scheduler.add(make_request(str(i), [i] * 3))
    step = scheduler.schedule()
    assert step is not None
    assert [row.request_id for row in step.rows] == admitted  # "2" needs a block, and two to spare


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


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (make_request("a", []), "^the prompt has no tokens$"),
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


def test_the_first_output_tells_the_time_in_the_queue() -> None:
    scheduler = make_scheduler(max_num_seqs=1)  # its clock ticks when it is read: at each arrival and first step
    scheduler.add(make_request("a", [1], max_tokens=2))
    scheduler.add(make_request("b", [1], max_tokens=2))
    runner = Runner(scheduler)
    runner.run()
    assert [output.queue_seconds for output in runner.outputs["a"]] == [2.0, None]
    assert [output.queue_seconds for output in runner.outputs["b"]] == [2.0, None]


def test_statistics_count_since_the_last_report() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1] * 5, max_tokens=1))
    scheduler.add(make_request("b", [1] * 5, max_tokens=2))
    runner = Runner(scheduler)
    runner.advance()
    stats = scheduler.take_stats()
    assert (stats.num_running, stats.num_waiting, stats.steps, stats.integrity_checks) == (1, 0, 1, 1)
    assert (stats.num_kv_blocks, stats.num_free_kv_blocks) == (16, 14)
    stats = scheduler.take_stats()
    assert (stats.steps, stats.integrity_checks) == (0, 0)
    assert (stats.batch_sizes, stats.step_tokens) == (None, None)
    runner.advance()
    scheduler.check_integrity()
    assert scheduler.take_stats().integrity_checks == 2


def test_each_steps_sequences_and_tokens_are_counted() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.add(make_request("a", [1] * 9, max_tokens=3))
    scheduler.add(make_request("b", [2] * 9, max_tokens=1))
    Runner(scheduler).run()
    stats = scheduler.take_stats()  # of steps of 9 + 7, 1 + 2 and 1 tokens, the last of one sequence
    assert stats.batch_sizes == HistogramDelta([1, 2, *[0] * (len(BATCH_SIZE_BUCKETS) - 1)], 5)
    assert stats.step_tokens == HistogramDelta([1, 0, 1, 0, 1, *[0] * (len(STEP_TOKENS_BUCKETS) - 4)], 20)


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
