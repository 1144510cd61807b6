"""What the scheduler tests share: a language model of a few lines, ranks that keep tokens in KV slots, their loop."""

import hashlib
import itertools

from hypothesis import strategies as st

from engine.protocol.messages import (
    FinishReason,
    Request,
    SamplingParams,
    ScheduledRow,
    ScheduledStep,
    TokenLogprobs,
    TokenOutput,
)
from engine.scheduler.result import StepResult
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.sequence import PENDING_TOKEN

EPOCH = 3
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


def logprobs_after(token_ids: list[int], token_id: int) -> TokenLogprobs:
    """What the language model says of `token_id` where it follows `token_ids`."""
    logprob = -float(hashlib.sha256(repr([token_ids, token_id]).encode()).digest()[0])
    return TokenLogprobs(token_id, logprob, 1, [], [])


def lone_logprobs(request: Request, output: list[int]) -> list[TokenLogprobs]:
    tokens = request.prompt_token_ids + output
    asked = request.sampling.logprobs is not None
    return [logprobs_after(tokens[:i], tokens[i]) for i in range(len(request.prompt_token_ids), len(tokens)) if asked]


def lone_prompt_logprobs(request: Request) -> list[TokenLogprobs]:
    prompt, asked = request.prompt_token_ids, request.sampling.prompt_logprobs is not None
    return [logprobs_after(prompt[:i], prompt[i]) for i in range(1, len(prompt)) if asked]


class FakeRank:
    """Obeys steps as a rank does; the 'KV cache' of a token is the token. Tells each sampled token's logprobs."""

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}
        self.sequences: dict[str, tuple[list[int], list[int]]] = {}
        self.errors: dict[str, str] = {}  # by request for which nothing can be sampled

    def run(self, step: ScheduledStep) -> StepResult:
        for request_id in step.finished:
            del self.sequences[request_id]
        for row in step.rows:
            self.write(row)
        tokens: dict[str, int | str] = {}
        logprobs, prompt_logprobs = {}, {}
        for row in step.rows:  # after all have written
            token_ids, _ = self.sequences[row.request_id]
            before = self.read(row.request_id, row.num_computed_tokens + row.num_scheduled_tokens)
            assert before == token_ids[: len(before)], "it would attend to keys of other tokens"
            if row.samples:
                assert len(before) == len(token_ids)
                token = next_token(before)
                tokens[row.request_id] = self.errors.get(row.request_id, token)
                logprobs[row.request_id] = logprobs_after(before, token)
            if row.prompt_logprobs is not None:
                wanted = range(row.prompt_logprobs.start, row.prompt_logprobs.stop)
                assert row.num_computed_tokens <= wanted.start < wanted.stop
                assert wanted.stop <= row.num_computed_tokens + row.num_scheduled_tokens
                prompt_logprobs[row.request_id] = [
                    logprobs_after(self.read(row.request_id, position + 1), token_ids[position + 1])
                    for position in wanted
                ]
        return StepResult(tokens, logprobs, prompt_logprobs)

    def write(self, row: ScheduledRow) -> None:
        if row.is_new:
            self.sequences[row.request_id] = ([], [])
        token_ids, blocks = self.sequences[row.request_id]
        assert PENDING_TOKEN not in row.new_token_ids
        token_ids.extend(row.new_token_ids)
        blocks.extend(row.new_block_ids)
        for position in range(row.num_computed_tokens, row.num_computed_tokens + row.num_scheduled_tokens):
            self.slots[self.slot(blocks, position)] = token_ids[position]

    def read(self, request_id: str, stop: int) -> list[int]:
        """Return the tokens before `stop`, from the slots."""
        return [self.slots[self.slot(self.sequences[request_id][1], position)] for position in range(stop)]

    def slot(self, blocks: list[int], position: int) -> int:
        return blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def make_scheduler(
    *,
    num_kv_blocks: int = 16,
    max_model_len: int = 64,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    enable_prefix_caching: bool = True,
) -> Scheduler:
    ticks = itertools.count()
    return Scheduler(
        epoch=EPOCH,
        num_kv_blocks=num_kv_blocks,
        block_size=BLOCK_SIZE,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=enable_prefix_caching,
        clock=lambda: float(next(ticks)),
    )


def make_request(
    request_id: str,
    prompt: list[int],
    max_tokens: int = 8,
    stop: tuple[int, ...] = (),
    *,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> Request:
    sampling = SamplingParams(
        max_tokens=max_tokens, stop_token_ids=stop, logprobs=logprobs, prompt_logprobs=prompt_logprobs
    )
    return Request(request_id, prompt, sampling)


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


class Runner:
    """Runs steps; their results are applied at once, or while the next step is scheduled already."""

    def __init__(self, scheduler: Scheduler, one_step_late: bool = False) -> None:
        self.scheduler = scheduler
        self.rank = FakeRank()
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.steps: list[ScheduledStep] = []
        self._one_step_late = one_step_late
        self._in_flight: tuple[ScheduledStep, StepResult] | None = None

    def advance(self) -> bool:
        """Run one step; return whether anything is left."""
        step = self.scheduler.schedule()
        if step is not None and self._in_flight is not None:
            self.scheduler.fill_pending(step, self._in_flight[1].tokens)
        self._apply()
        if step is not None:
            self.steps.append(step)
            assert len(self.scheduler.sampling_rows(step)) == sum(row.samples for row in step.rows)
            self._in_flight = (step, self.rank.run(step))
        if not self._one_step_late:
            self._apply()
        self.scheduler.check_integrity()
        return self.scheduler.has_work or self._in_flight is not None

    def run(self) -> None:
        """Run to the end."""
        for _ in range(20_000):
            if not self.advance():
                return
        raise AssertionError("the scheduler does not come to an end")

    def rows(self, request_id: str) -> list[ScheduledRow]:
        """Return what was scheduled of a request so far."""
        return [row for step in self.steps for row in step.rows if row.request_id == request_id]

    def tokens(self, request_id: str) -> list[int]:
        """Return what a request got so far."""
        return [token_id for output in self.outputs.get(request_id, []) for token_id in output.token_ids]

    def logprobs(self, request_id: str) -> list[TokenLogprobs]:
        """Return what was told of its tokens so far."""
        return [logprobs for output in self.outputs.get(request_id, []) for logprobs in output.logprobs]

    def prompt_logprobs(self, request_id: str) -> list[TokenLogprobs]:
        """Return what was told of its prompt so far."""
        return [logprobs for output in self.outputs.get(request_id, []) for logprobs in output.prompt_logprobs]

    def _apply(self) -> None:
        if self._in_flight is None:
            return
        in_flight, self._in_flight = self._in_flight, None
        for output in self.scheduler.apply(*in_flight):
            outputs = self.outputs.setdefault(output.request_id, [])
            assert not outputs or outputs[-1].finish_reason is None, "output after the finish"
            assert (output.error is None) == (output.finish_reason is not FinishReason.ERROR)
            outputs.append(output)
