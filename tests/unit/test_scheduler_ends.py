"""How a sequence ends: by a stop token, at a length, by an error, by an abort at any point of its way."""

from engine.protocol.messages import FinishReason
from engine.scheduler.scheduler import Scheduler
from tests.unit.scheduler_support import Runner, lone_output, make_request, make_scheduler

NOT_FINITE = "the logits are not finite"


def num_held_blocks(scheduler: Scheduler) -> int:
    stats = scheduler.take_stats()
    return stats.num_kv_blocks - stats.num_free_kv_blocks


def told_to_forget(runner: Runner) -> list[str]:
    """Return the sequences that the ranks were told to forget."""
    return [request_id for step in runner.steps for request_id in step.finished]


def test_a_stop_token_is_emitted_and_ends_the_sequence() -> None:
    stop = lone_output(make_request("a", [3, 4], max_tokens=30), 64)[4]
    runner = Runner(make_scheduler())
    runner.scheduler.add(make_request("a", [3, 4], max_tokens=30, stop=(stop,)))
    runner.run()
    assert runner.tokens("a")[-1] == stop
    assert stop not in runner.tokens("a")[:-1]
    assert runner.outputs["a"][-1].finish_reason is FinishReason.STOP


def test_a_stop_token_in_the_prompt_ends_nothing() -> None:
    runner = Runner(make_scheduler(max_num_batched_tokens=1))
    runner.scheduler.add(make_request("a", [3, 3], max_tokens=1, stop=(3,), prompt_logprobs=0))
    runner.run()
    assert [len(output.token_ids) for output in runner.outputs["a"]] == [0, 1]


def test_a_sequence_ends_at_its_length() -> None:
    runner = Runner(make_scheduler())
    runner.scheduler.add(make_request("a", [1] * 9, max_tokens=3))
    runner.run()
    assert len(runner.tokens("a")) == 3
    assert runner.outputs["a"][-1].finish_reason is FinishReason.LENGTH


def test_a_sequence_ends_at_the_context_length() -> None:
    runner = Runner(make_scheduler(max_model_len=12))
    runner.scheduler.add(make_request("a", [1] * 9, max_tokens=100))
    runner.run()
    assert len(runner.tokens("a")) == 3
    assert runner.outputs["a"][-1].finish_reason is FinishReason.LENGTH


def test_ranks_are_told_once_to_forget_a_sequence_that_ended() -> None:
    runner = Runner(make_scheduler())
    runner.scheduler.add(make_request("short", [1], max_tokens=1))
    runner.scheduler.add(make_request("long", [2], max_tokens=5))
    runner.run()
    assert [step.finished for step in runner.steps] == [[], ["short"], [], [], []]


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_row_that_could_not_be_sampled_ends_its_request_alone() -> None:
    runner = Runner(make_scheduler())
    runner.scheduler.add(make_request("bad", [1], logprobs=0))
    runner.scheduler.add(make_request("good", [2]))
    runner.rank.errors["bad"] = NOT_FINITE
    runner.run()
    [output] = runner.outputs["bad"]
    assert (output.finish_reason, output.error, output.token_ids) == (FinishReason.ERROR, NOT_FINITE, [])
    assert output.logprobs == []
    assert runner.tokens("good") == lone_output(make_request("good", [2]), 64)


def test_a_row_that_could_not_be_sampled_ends_although_its_next_step_is_scheduled() -> None:
    runner = Runner(make_scheduler(), one_step_late=True)
    runner.scheduler.add(make_request("bad", [1]))
    runner.rank.errors["bad"] = NOT_FINITE
    runner.run()
    assert [output.error for output in runner.outputs["bad"]] == [NOT_FINITE]
    assert [row.new_token_ids for row in runner.rows("bad")] == [[1], [0]]  # 0 stands in for what was not sampled
    assert num_held_blocks(runner.scheduler) == 0


def test_a_sequence_that_could_not_be_sampled_ends_although_it_was_preempted_meanwhile() -> None:
    runner = Runner(make_scheduler(num_kv_blocks=4, max_model_len=16), one_step_late=True)
    runner.scheduler.add(make_request("old", [1] * 8, max_tokens=8))
    runner.scheduler.add(make_request("young", [2] * 4, max_tokens=8))
    runner.rank.errors["young"] = NOT_FINITE
    runner.run()
    assert [output.error for output in runner.outputs["young"]] == [NOT_FINITE]
    assert runner.scheduler.take_stats().preemptions == 1
    assert runner.tokens("old") == lone_output(make_request("old", [1] * 8, max_tokens=8), 16)


# --- aborts ----------------------------------------------------------------------------------------------------------


def test_a_waiting_sequence_that_is_aborted_never_runs() -> None:
    runner = Runner(make_scheduler(max_num_seqs=1))
    runner.scheduler.add(make_request("runs", [1]))
    runner.scheduler.add(make_request("waits", [2]))
    runner.advance()
    runner.scheduler.abort("waits")
    runner.run()
    assert list(runner.outputs) == ["runs"]
    assert told_to_forget(runner) == []  # nobody has heard of it


def test_a_running_sequence_that_is_aborted_gives_its_blocks_back_and_is_forgotten() -> None:
    runner = Runner(make_scheduler())
    runner.scheduler.add(make_request("stays", [1] * 3))
    runner.scheduler.add(make_request("goes", [2] * 9))
    runner.advance()
    assert num_held_blocks(runner.scheduler) == 1 + 3
    runner.scheduler.abort("goes")
    assert num_held_blocks(runner.scheduler) == 1
    runner.run()
    assert len(runner.outputs["goes"]) == 1
    assert told_to_forget(runner) == ["goes"]
    assert runner.tokens("stays") == lone_output(make_request("stays", [1] * 3), 64)


def test_what_a_step_in_flight_brings_for_an_aborted_sequence_is_dropped() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("goes", [1], prompt_logprobs=0))
    scheduler.add(make_request("stays", [2]))
    runner = Runner(scheduler, one_step_late=True)
    runner.advance()
    scheduler.abort("goes")
    runner.run()
    assert list(runner.outputs) == ["stays"]


def test_what_a_step_in_flight_brings_for_an_aborted_sequence_is_not_given_to_one_with_the_same_id() -> None:
    runner = Runner(make_scheduler(), one_step_late=True)
    runner.scheduler.add(make_request("a", [1]))
    runner.advance()
    runner.scheduler.abort("a")
    again = make_request("a", [2])
    runner.scheduler.add(again)
    runner.run()
    assert runner.tokens("a") == lone_output(again, 64)


def test_a_sequence_that_is_aborted_while_its_prompt_is_computed_in_chunks_gives_its_blocks_back() -> None:
    runner = Runner(make_scheduler(max_num_batched_tokens=5))
    runner.scheduler.add(make_request("goes", [1] * 20))
    runner.advance()
    assert num_held_blocks(runner.scheduler) == 2
    runner.scheduler.abort("goes")
    assert num_held_blocks(runner.scheduler) == 0
    runner.scheduler.add(make_request("next", [1] * 20))
    runner.run()
    assert list(runner.outputs) == ["next"]
    assert runner.outputs["next"][0].num_cached_tokens == 4  # of what was computed before the abort
    assert runner.tokens("next") == lone_output(make_request("next", [1] * 20), 64)


def test_a_preempted_sequence_that_is_aborted_does_not_come_back_and_is_forgotten() -> None:
    runner = Runner(make_scheduler(num_kv_blocks=4, max_model_len=16))
    runner.scheduler.add(make_request("old", [1] * 8, max_tokens=8))
    runner.scheduler.add(make_request("young", [2] * 4, max_tokens=8))
    while runner.scheduler.take_stats().preemptions == 0:
        runner.advance()
    runner.scheduler.abort("young")
    runner.run()
    assert told_to_forget(runner) == ["young"]
    assert runner.outputs["young"][-1].finish_reason is None


def test_an_abort_of_a_sequence_that_is_gone_is_ignored() -> None:
    runner = Runner(make_scheduler())
    runner.scheduler.abort("never")
    runner.scheduler.add(make_request("done", [1], max_tokens=1))
    runner.run()
    runner.scheduler.abort("done")
    assert not runner.scheduler.has_work
