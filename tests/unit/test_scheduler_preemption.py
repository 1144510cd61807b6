"""When KV blocks run out, the youngest gives up its own and is computed again later."""

import pytest

from tests.unit.scheduler_support import Runner, lone_output, make_request, make_scheduler


def test_running_out_of_blocks_preempts_the_youngest_which_finishes_later() -> None:
    requests = [make_request(str(i), [i] * 10, max_tokens=18) for i in range(3)]
    runner = Runner(make_scheduler(num_kv_blocks=8, max_model_len=32))
    for request in requests:
        runner.scheduler.add(request)
    runner.run()
    for request in requests:
        assert runner.tokens(request.request_id) == lone_output(request, 32)
    assert runner.scheduler.take_stats().preemptions > 0
    assert sum(row.is_new for row in runner.rows("0")) == 1, "the oldest is never preempted"


def test_the_oldest_takes_block_after_block_until_it_runs_alone() -> None:
    runner = Runner(make_scheduler(num_kv_blocks=8, max_model_len=32))
    requests = [make_request(str(i), [i] * 4, max_tokens=28) for i in range(3)]
    for request in requests:
        runner.scheduler.add(request)
    while len(runner.tokens("0")) < 27:
        runner.advance()
    assert [row.request_id for row in runner.steps[-1].rows] == ["0"]
    stats = runner.scheduler.take_stats()
    assert (stats.num_running, stats.num_waiting) == (1, 2)
    assert stats.preemptions == 2
    runner.run()
    finished = sorted(runner.outputs, key=lambda request_id: runner.rows(request_id)[-1].num_computed_tokens)
    assert finished == ["0", "1", "2"]
    for request in requests:
        assert runner.tokens(request.request_id) == lone_output(request, 32)


def test_victims_come_back_in_their_order_of_arrival() -> None:
    runner = Runner(make_scheduler(num_kv_blocks=8, max_model_len=32))
    for i in range(4):
        runner.scheduler.add(make_request(str(i), [i] * 4, max_tokens=28))
    runner.run()
    comebacks = [row.request_id for step in runner.steps[1:] for row in step.rows if row.is_new]
    assert comebacks == sorted(comebacks)
    assert {"1", "2"} <= set(comebacks)


@pytest.mark.parametrize("one_step_late", [False, True])
def test_a_sequence_that_finds_no_block_and_nobody_younger_gives_up_its_own(one_step_late: bool) -> None:
    runner = Runner(make_scheduler(num_kv_blocks=4, max_model_len=16), one_step_late)
    old, young = make_request("old", [1] * 8, max_tokens=8), make_request("young", [2] * 4, max_tokens=8)
    runner.scheduler.add(old)
    runner.scheduler.add(young)
    runner.advance()
    runner.advance()  # both need a block, and one is left
    assert [row.request_id for row in runner.steps[1].rows] == ["old"]
    assert runner.scheduler.take_stats().preemptions == 1
    runner.run()
    assert runner.tokens("old") == lone_output(old, 16)
    assert runner.tokens("young") == lone_output(young, 16)


def test_a_sequence_that_only_waits_for_its_last_token_can_be_preempted_and_gets_it() -> None:
    runner = Runner(make_scheduler(num_kv_blocks=7, max_model_len=28), one_step_late=True)
    requests = [
        make_request("takes one at its 9th token, first", [1] * 8, max_tokens=5),
        make_request("takes one at its 9th token, later", [2] * 5, max_tokens=5),
        make_request("victim", [3] * 4, max_tokens=4),
    ]
    for request in requests:
        runner.scheduler.add(request)
    runner.run()
    assert runner.scheduler.take_stats().preemptions == 1
    assert len(runner.rows("victim")) == 4, "it was computed again"
    for request in requests:
        assert runner.tokens(request.request_id) == lone_output(request, 28)


def test_a_sequence_whose_prompt_is_computed_in_chunks_can_be_preempted_between_them() -> None:
    runner = Runner(make_scheduler(num_kv_blocks=8, max_model_len=32, max_num_batched_tokens=3))
    old, young = make_request("old", [1] * 4, max_tokens=20), make_request("young", [2] * 20, max_tokens=1)
    runner.scheduler.add(old)
    runner.scheduler.add(young)
    runner.run()
    assert runner.scheduler.take_stats().preemptions == 1
    first, again = [i for i, row in enumerate(runner.rows("young")) if row.is_new]
    assert not any(row.samples for row in runner.rows("young")[first:again])
    assert runner.tokens("old") == lone_output(old, 32)
    assert runner.tokens("young") == lone_output(young, 32)
