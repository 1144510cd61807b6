"""Requests that a lost engine had begun go on in the next one as if nothing had been."""

from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.protocol.messages import Request, TokenLogprobs
from engine.sampling.row import SamplingRow
from tests.unit.scheduler_support import (
    Runner,
    drawn_requests,
    lone_logprobs,
    lone_output,
    lone_prompt_logprobs,
    make_request,
    make_scheduler,
)


@dataclass
class Received:
    """What a client has of a request, from all engines together."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    has_finished: bool = False

    def take(self, runner: Runner, request_id: str) -> None:
        self.token_ids += runner.tokens(request_id)
        self.logprobs += runner.logprobs(request_id)
        self.prompt_logprobs += runner.prompt_logprobs(request_id)
        outputs = runner.outputs.get(request_id, [])
        self.has_finished |= bool(outputs) and outputs[-1].finish_reason is not None

    def rest(self, request: Request) -> Request:
        return msgspec.structs.replace(
            request,
            received_token_ids=list(self.token_ids),
            num_received_prompt_logprobs=len(self.prompt_logprobs),
        )


@settings(max_examples=150)
@given(drawn_requests(), st.lists(st.integers(0, 12), max_size=6), st.integers(1, 20), st.booleans(), st.booleans())
def test_engines_lost_at_any_moment_change_nothing(
    requests: list[Request], lives: list[int], budget: int, one_step_late: bool, enable_prefix_caching: bool
) -> None:
    received = {request.request_id: Received() for request in requests}
    for num_steps in [*lives, 20_000]:
        scheduler = make_scheduler(
            num_kv_blocks=12,
            max_model_len=32,
            max_num_batched_tokens=budget,
            enable_prefix_caching=enable_prefix_caching,
        )
        unfinished = [request for request in requests if not received[request.request_id].has_finished]
        for request in unfinished:
            scheduler.add(received[request.request_id].rest(request))
        runner = Runner(scheduler, one_step_late)
        for _ in range(num_steps):
            if not runner.advance():
                break
        for request in unfinished:
            received[request.request_id].take(runner, request.request_id)
    for request in requests:
        expected, of_request = lone_output(request, 32), received[request.request_id]
        assert of_request.has_finished
        assert of_request.token_ids == expected
        assert of_request.logprobs == lone_logprobs(request, expected)
        assert of_request.prompt_logprobs == lone_prompt_logprobs(request)


def test_what_was_received_counts_as_output() -> None:
    scheduler = make_scheduler()
    request = msgspec.structs.replace(make_request("a", [1, 2], max_tokens=5), received_token_ids=[7, 8])
    scheduler.add(request)
    runner = Runner(scheduler)
    step = scheduler.schedule()
    assert step is not None
    assert scheduler.sampling_rows(step) == [SamplingRow(request.sampling, [1, 2, 7, 8], 2)]
    scheduler.apply(step, runner.rank.run(step))
    runner.run()
    assert len(runner.tokens("a")) == 2  # with the first, three


def test_a_request_that_received_all_it_may_is_refused() -> None:
    scheduler = make_scheduler()
    request = msgspec.structs.replace(make_request("a", [1, 2], max_tokens=2), received_token_ids=[7, 8])
    with pytest.raises(ValueError, match="2 tokens were received of at most 2"):
        scheduler.add(request)
