"""One sequence as the scheduler knows it."""

from dataclasses import dataclass, field

from engine.protocol.messages import FinishReason, Request


@dataclass(eq=False)
class Sequence:
    """A request on its way.

    Its tokens, of which the first `num_computed_tokens` are scheduled already:

        |------------- prompt -------------|---- outputs ----|-- pending --|
        |---- computed ----|--- still to be scheduled: num_uncomputed -----|

    A pending token is one that a scheduled step will sample and whose value is not known yet: results of a step may be
    applied while the next one is scheduled already.
    """

    request: Request
    arrival: int  # order of arrival, the priority
    arrival_time: float  # seconds on the scheduler's clock
    max_output_tokens: int
    token_ids: list[int] = field(init=False)
    num_pending_tokens: int = 0
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    num_sent_tokens: int = 0  # what the ranks know of token_ids (pending ones included) …
    num_sent_blocks: int = 0  # … and of block_ids
    is_known_to_ranks: bool = False  # it was in a step once
    num_prompt_logprobs: int = 0  # delivered, or about to be by a scheduled step
    queue_seconds: float | None = None  # set by the first step, taken by the first output …
    num_cached_tokens: int | None = None  # … and so is this

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        """Known and pending tokens."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens that followed the prompt so far."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """What is still to be scheduled; nothing when the pending tokens are the last that may be asked for."""
        if self.num_output_tokens + self.num_pending_tokens >= self.max_output_tokens:
            return 0
        return self.num_tokens - self.num_computed_tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the last known token is the last of all, or None if others may follow."""
        if self.token_ids[-1] in self.request.sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_output_tokens >= self.max_output_tokens else None

    def take_news_of_first_step(self) -> tuple[float | None, int | None]:
        """Return the time in the queue and the number of cached tokens, to the first output only."""
        news = self.queue_seconds, self.num_cached_tokens
        self.queue_seconds = self.num_cached_tokens = None
        return news

    def forget_computed(self) -> list[int]:
        """Start over, as after a preemption; return the blocks held."""
        block_ids, self.block_ids = self.block_ids, []
        self.num_computed_tokens = self.num_sent_tokens = self.num_sent_blocks = 0
        return block_ids
