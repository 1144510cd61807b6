"""Sequences that begin alike share KV blocks."""

import msgspec
import pytest

from tests.unit.scheduler_support import (
    BLOCK_SIZE,
    Runner,
    lone_output,
    lone_prompt_logprobs,
    make_request,
    make_scheduler,
)

PROMPT = list(range(30))
NUM_FULL = (len(PROMPT) - 1) // BLOCK_SIZE  # blocks of the prompt that may be shared: its last token is always computed


def run(runner: Runner, *prompts: list[int], max_tokens: int = 4) -> list[int]:
    """Run one request after the other, each with the engine to itself; return how much each found in the cache."""
    first = len(runner.outputs)
    for i, prompt in enumerate(prompts, start=first):
        runner.scheduler.add(make_request(str(i), prompt, max_tokens=max_tokens))
        runner.run()
    return [num_cached(runner, str(i)) for i in range(first, len(runner.outputs))]


def num_cached(runner: Runner, request_id: str) -> int:
    number = runner.outputs[request_id][0].num_cached_tokens
    assert number is not None
    return number


def test_four_choices_of_one_prompt_hold_its_full_blocks_once_and_a_tail_each() -> None:
    scheduler = make_scheduler(num_kv_blocks=40)
    for i in range(4):
        scheduler.add(make_request(str(i), PROMPT))
    runner = Runner(scheduler)
    runner.advance()
    rows = runner.steps[0].rows
    assert [row.num_scheduled_tokens for row in rows] == [30, 2, 2, 2]
    assert all(row.new_block_ids[:NUM_FULL] == rows[0].new_block_ids[:NUM_FULL] for row in rows)
    stats = scheduler.take_stats()
    assert stats.num_kv_blocks - stats.num_free_kv_blocks == NUM_FULL + 4
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (4 * 30, 3 * 28)
    assert scheduler.take_stats().prefix_cache_queries == scheduler.take_stats().prefix_cache_hits == 0


def test_a_repeated_prompt_is_found_after_its_sequence_has_gone() -> None:
    runner = Runner(make_scheduler())
    assert run(runner, PROMPT, PROMPT) == [0, 28]
    assert runner.tokens("1") == runner.tokens("0")


@pytest.mark.parametrize(("length", "found"), [(7, 4), (8, 4), (9, 8)])
def test_the_last_prompt_token_is_computed_although_its_block_is_cached(length: int, found: int) -> None:
    runner = Runner(make_scheduler())
    assert run(runner, PROMPT[:length], PROMPT[:length]) == [0, found]
    assert next(row.num_scheduled_tokens for row in runner.rows("1")) == length - found


@pytest.mark.parametrize(("one_step_late", "found"), [(False, 40), (True, 36)])  # late: the last is not known in time
def test_a_conversation_finds_what_was_said_before_answers_included(one_step_late: bool, found: int) -> None:
    runner = Runner(make_scheduler(), one_step_late)
    run(runner, PROMPT, max_tokens=11)
    said = PROMPT + runner.tokens("0")  # the last, 41st, was never computed
    assert run(runner, [*said, 1, 2]) == [found]


def test_a_prompt_that_is_computed_in_chunks_is_shared_by_those_who_come_meanwhile() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=13)
    runner = Runner(scheduler)
    scheduler.add(make_request("first", PROMPT))
    scheduler.add(make_request("second", PROMPT))
    runner.run()
    assert num_cached(runner, "second") == 28
    assert runner.tokens("first") == runner.tokens("second") == lone_output(make_request("", PROMPT), 64)


def test_what_is_not_used_for_longest_is_evicted_first() -> None:
    runner = Runner(make_scheduler(num_kv_blocks=16))
    other = [50] * 24
    run(runner, PROMPT, other, PROMPT, max_tokens=1)  # 7 and 6 blocks can be found; the 7 were used again
    run(runner, [60] * 20, max_tokens=1)  # takes the 3 others, and the last 2 of `other`
    assert run(runner, PROMPT, other, max_tokens=1) == [28, 12]  # PROMPT's tail took one more


def test_a_preempted_sequence_finds_what_is_left_of_its_blocks() -> None:
    scheduler = make_scheduler(num_kv_blocks=8, max_model_len=32)
    requests = [make_request("old", [1] * 14, max_tokens=9), make_request("young", [2] * 12, max_tokens=9)]
    for request in requests:
        scheduler.add(request)
    runner = Runner(scheduler)
    runner.run()
    assert scheduler.take_stats().preemptions == 1
    first, again = [row for row in runner.rows("young") if row.is_new]
    assert first.num_computed_tokens == 0
    assert again.num_computed_tokens > 0
    assert [runner.tokens(request.request_id) for request in requests] == [lone_output(r, 32) for r in requests]
    assert num_cached(runner, "young") == 0  # which tells of the first time


def test_a_sequence_that_is_computed_again_is_not_counted_as_a_query() -> None:
    scheduler = make_scheduler(num_kv_blocks=8, max_model_len=32)
    scheduler.add(make_request("old", [1] * 14, max_tokens=9))
    scheduler.add(make_request("young", [2] * 12, max_tokens=9))
    Runner(scheduler).run()
    stats = scheduler.take_stats()
    assert (stats.preemptions, stats.prefix_cache_queries, stats.prefix_cache_hits) == (1, 26, 0)


def test_positions_whose_logprobs_are_wanted_are_computed_although_they_are_cached() -> None:
    runner = Runner(make_scheduler())
    run(runner, PROMPT)
    wants = make_request("wants", PROMPT, prompt_logprobs=1)
    runner.scheduler.add(wants)
    runner.run()
    assert num_cached(runner, "wants") == 0
    assert runner.prompt_logprobs("wants") == lone_prompt_logprobs(wants)


@pytest.mark.parametrize("prompt_logprobs", [None, 1])
def test_logprobs_that_were_delivered_before_a_preemption_do_not_keep_it_from_the_cache(
    prompt_logprobs: int | None,
) -> None:
    scheduler = make_scheduler(num_kv_blocks=8, max_model_len=32)
    young = make_request("young", [2] * 6, max_tokens=9, prompt_logprobs=prompt_logprobs)
    scheduler.add(make_request("old", [1] * 14, max_tokens=9))
    scheduler.add(young)
    runner = Runner(scheduler)
    runner.run()
    assert [row.num_computed_tokens for row in runner.rows("young") if row.is_new] == [0, 8]
    assert runner.prompt_logprobs("young") == lone_prompt_logprobs(young)


def test_sequences_that_fit_only_because_they_share_run_together() -> None:
    scheduler = make_scheduler(num_kv_blocks=16)
    for i in range(4):
        scheduler.add(make_request(str(i), PROMPT, max_tokens=2))
    runner = Runner(scheduler)
    runner.advance()
    assert len(runner.steps[0].rows) == 4  # 8 blocks each would be 32


def test_blocks_that_are_found_but_held_by_nobody_are_not_counted_as_free_twice() -> None:
    runner = Runner(make_scheduler(num_kv_blocks=16))
    run(runner, PROMPT, max_tokens=1)
    runner.scheduler.add(make_request("big", [50] * 35, max_tokens=2))  # leaves 7: what holds PROMPT's beginning
    runner.scheduler.add(make_request("again", PROMPT, max_tokens=1))  # would need these and one more
    runner.advance()
    assert [row.request_id for row in runner.steps[-1].rows] == ["big"]
    runner.run()
    assert num_cached(runner, "again") == 28


def test_without_prefix_caching_nothing_is_shared_looked_up_or_counted() -> None:
    runner = Runner(make_scheduler(num_kv_blocks=40, enable_prefix_caching=False))
    assert run(runner, PROMPT, PROMPT) == [0, 0]
    stats = runner.scheduler.take_stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (0, 0)


def test_the_same_requests_give_the_same_steps() -> None:
    def steps() -> list[bytes]:
        scheduler = make_scheduler(num_kv_blocks=16, max_num_batched_tokens=11)
        runner = Runner(scheduler)
        for i in range(8):
            scheduler.add(make_request(f"request {i}", [*PROMPT[: 9 + i], i], max_tokens=12))
        runner.run()
        assert scheduler.take_stats().preemptions > 0
        return [msgspec.msgpack.encode(step) for step in runner.steps]

    assert steps() == steps()
