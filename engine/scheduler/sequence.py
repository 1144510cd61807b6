"""One sequence as the scheduler knows it."""

from dataclasses import dataclass, field

from engine.kvcache.manager import BlockTable
from engine.protocol.messages import FinishReason, PromptLogprobs, Request, ScheduledRow, TokenOutput
from engine.sampling.row import SamplingRow
from engine.scheduler.result import StepResult

# In a step's `new_token_ids`: sampled by a step before, not known yet when this one was scheduled.
PENDING_TOKEN = -1


@dataclass(eq=False)
class Sequence:
    """A request on its way.

    Its tokens, of which the first `num_computed_tokens` are scheduled already, or were found in the KV cache:

        |------------- prompt -------------|---- outputs ----|-- pending --|
        |---- computed ----|--- still to be scheduled: num_uncomputed -----|

    A pending token is one that a scheduled step will sample and whose value is not known yet: results of a step may be
    applied while the next one is scheduled already.
    """

    request: Request
    arrival_time: float  # seconds on the scheduler's clock
    max_output_tokens: int
    token_ids: list[int] = field(init=False)
    num_pending_tokens: int = 0
    num_computed_tokens: int = 0
    block_table: BlockTable = field(default_factory=BlockTable)
    num_sent_tokens: int = 0  # what the ranks know of token_ids (pending ones included) …
    num_sent_blocks: int = 0  # … and of the block table
    num_prompt_logprobs: int = 0  # delivered, or about to be by a scheduled step
    is_known_to_ranks: bool = False  # it was in a step once
    queue_seconds: float | None = None  # set by the first step, taken by the first output …
    num_cached_tokens: int | None = None  # … and so is this

    def __post_init__(self) -> None:
        self.token_ids = [*self.request.prompt_token_ids, *self.request.received_token_ids]
        self.num_prompt_logprobs = self.request.num_received_prompt_logprobs

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the request's prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Known and pending tokens."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens that followed the prompt so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """What is still to be scheduled; nothing when the pending tokens are the last that may be asked for."""
        if self.num_output_tokens + self.num_pending_tokens >= self.max_output_tokens:
            return 0
        return self.num_tokens - self.num_computed_tokens

    @property
    def num_skippable_tokens(self) -> int:
        """Tokens that need not be computed if they are cached: neither the last, nor any whose logprobs are wanted."""
        last = len(self.token_ids) - 1
        if self.request.sampling.prompt_logprobs is None or self.num_prompt_logprobs == self.num_prompt_tokens - 1:
            return last
        return self.num_prompt_logprobs

    @property
    def sampling_row(self) -> SamplingRow:
        """What the sampler needs to know."""
        return SamplingRow(self.request.sampling, self.token_ids, self.num_prompt_tokens)

    def schedule(self, count: int) -> ScheduledRow:
        """Advance by `count` tokens and say what the ranks do not know yet."""
        num_unsent_pending = self.num_tokens - max(self.num_sent_tokens, len(self.token_ids))
        stop = self.num_computed_tokens + count
        row = ScheduledRow(
            request_id=self.request_id,
            is_new=self.num_sent_tokens == 0,
            new_token_ids=self.token_ids[self.num_sent_tokens :] + [PENDING_TOKEN] * num_unsent_pending,
            new_block_ids=self.block_table.block_ids[self.num_sent_blocks :],
            num_computed_tokens=self.num_computed_tokens,
            num_scheduled_tokens=count,
            samples=stop == self.num_tokens,
            prompt_logprobs=self._want_prompt_logprobs(stop),
        )
        self.num_sent_tokens = self.num_tokens
        self.num_sent_blocks = len(self.block_table.block_ids)
        self.num_computed_tokens = stop
        self.num_pending_tokens += row.samples
        return row

    def _want_prompt_logprobs(self, stop: int) -> PromptLogprobs | None:
        """Ask for what a step up to the position `stop` can bring of the prompt's logprobs, each once.

        What is asked for is delivered, as long as the sequence is there: a preemption takes no results back.
        """
        start, num_top = self.num_prompt_logprobs, self.request.sampling.prompt_logprobs
        stop = min(stop, self.num_prompt_tokens - 1)
        if num_top is None or start >= stop:
            return None
        self.num_prompt_logprobs = stop
        return PromptLogprobs(start, stop, num_top)

    def take(self, row: ScheduledRow, result: StepResult) -> TokenOutput | None:
        """Take what a step brought for `row`; an output with a finish reason is the last."""
        if not row.samples and row.prompt_logprobs is None:
            return None
        token = result.tokens[self.request_id] if row.samples else None
        token_ids = [token] if isinstance(token, int) else []
        has_logprobs = bool(token_ids) and self.request.sampling.logprobs is not None
        self.num_pending_tokens -= row.samples
        self.token_ids.extend(token_ids)
        queue_seconds, self.queue_seconds = self.queue_seconds, None
        num_cached_tokens, self.num_cached_tokens = self.num_cached_tokens, None
        return TokenOutput(
            self.request_id,
            token_ids,
            finish_reason=self._finish_reason(token),
            error=token if isinstance(token, str) else None,
            logprobs=[result.logprobs[self.request_id]] if has_logprobs else [],
            prompt_logprobs=[] if row.prompt_logprobs is None else result.prompt_logprobs[self.request_id],
            queue_seconds=queue_seconds,
            num_cached_tokens=num_cached_tokens,
        )

    def _finish_reason(self, token: int | str | None) -> FinishReason | None:
        if token is None:
            return None
        if isinstance(token, str):
            return FinishReason.ERROR
        if token in self.request.sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_output_tokens >= self.max_output_tokens else None

    def begin(self, block_table: BlockTable, num_cached_tokens: int) -> None:
        """Start with blocks that hold the first `num_cached_tokens` tokens."""
        self.block_table = block_table
        self.num_computed_tokens = num_cached_tokens

    def forget_computed(self) -> BlockTable:
        """Start over, as after a preemption; return the blocks held."""
        block_table, self.block_table = self.block_table, BlockTable()
        self.num_computed_tokens = self.num_sent_tokens = self.num_sent_blocks = 0
        return block_table
