"""One API request's sequences on their way: token outputs in, pieces of text out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from engine.protocol.messages import Request, SamplingParams, TokenLogprobs, TokenOutput
from server.admission import AdmissionInbox, AdmissionQueue
from server.choice import Choice, Delta, Reason, TextOptions
from server.errors import APIError
from server.text.token_bytes import TokenBytes
from server.transcript import LogprobEntry


@dataclass(frozen=True)
class GenerationPlan:
    """What an API request asks for, in the engine's terms."""

    response_id: str
    prompts: list[list[int]]
    sampling: SamplingParams
    num_sampled: int  # of each prompt …
    num_choices: int  # … of which so many are wanted: the likeliest
    text: TextOptions
    arrival: float  # of the API request, by `time.perf_counter`
    key: str  # name of the API key that it came with
    deadline: float | None  # when it ends with an error if it has not ended before, by the same clock


@dataclass(frozen=True)
class Completion:
    """One choice as a whole."""

    index: int
    source: Choice
    text: str
    finish_reason: Reason
    stop_reason: str | int | None
    token_ids: list[int]
    entries: list[LogprobEntry]
    prompt_logprobs: list[TokenLogprobs]


class Generation:
    """All choices of one API request, numbered prompt by prompt.

    `submit` sends it to the engine and `next` returns what came, until `has_ended`. `withdraw` takes it back, and
    another `submit` goes on where it was: nothing is lost, nothing comes twice. `abort` ends it wherever it is.
    """

    def __init__(self, queue: AdmissionQueue, token_bytes: TokenBytes, plan: GenerationPlan) -> None:
        self._queue = queue
        self._plan = plan
        self._waiting: Sequence[Request] = _requests(plan)  # not with the engine: not yet, or not now
        self._inbox: AdmissionInbox | None = None
        self._failure: APIError | None = None
        self._open = {
            request.request_id: Choice(index, request, plan.text, token_bytes)
            for index, request in enumerate(self._waiting)
        }
        self.choices: Sequence[Choice] = tuple(self._open.values())

    @property
    def response_id(self) -> str:
        """The id that the answer carries."""
        return self._plan.response_id

    @property
    def has_ended(self) -> bool:
        """Whether every choice has finished."""
        return not self._open

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(map(len, self._plan.prompts))

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that did not have to be computed, those of each prompt's first choice."""
        return sum(choice.num_cached_tokens for choice in self.choices[:: self._plan.num_sampled])

    @property
    def num_completion_tokens(self) -> int:
        """Tokens generated so far, stop tokens included."""
        return sum(choice.num_tokens for choice in self.choices)

    def submit(self) -> None:
        """Send what is not with the engine.

        Raises:
            APIError: when it takes no requests, or the deadline has passed.
        """
        if self._waiting:
            plan = self._plan
            self._inbox = self._queue.submit(self._waiting, plan.arrival, plan.key, plan.deadline, self._inbox)
            self._waiting = ()

    async def next(self) -> list[Delta]:
        """Wait for something to come, and return all there is. What comes before an error is returned before it.

        Raises:
            APIError: when the engine could not finish the request.
        """
        assert self._inbox is not None
        if self._failure is None:
            deltas = self._feed_all(await self._inbox.take())
            if deltas or self._failure is None:
                return deltas
        raise self._failure

    def withdraw(self) -> None:
        """Take what has not finished back from the engine; what had come until now is the first that `next` returns."""
        self._waiting = (*self._waiting, *self._queue.withdraw(self._open).values())

    def abort(self) -> None:
        """End what has not finished."""
        self._queue.abort(self._open)
        if self._inbox is not None:
            self._queue.forget([request.request_id for request in self._waiting])
        self._waiting = ()
        self._open.clear()

    async def collect(self) -> list[Completion]:
        """Submit the request and return the whole of every choice that is wanted.

        Raises:
            APIError: see `submit` and `next`.
        """
        parts: list[list[Delta]] = [[] for _ in self.choices]
        try:
            self.submit()
            while not self.has_ended:
                for delta in await self.next():
                    parts[delta.index].append(delta)
        finally:
            self.abort()
        return [self._join(index, choice, parts[choice.index]) for index, choice in enumerate(self._best())]

    def _feed_all(self, outputs: Iterable[TokenOutput]) -> list[Delta]:
        """Return what `outputs` add, up to the first error, which is kept."""
        deltas: list[Delta] = []
        for output in outputs:
            if output.request_id not in self._open:
                continue
            try:
                deltas.append(self._feed(output))
            except APIError as error:
                self._failure = error
                break
        return deltas

    def _feed(self, output: TokenOutput) -> Delta:
        delta = self._open[output.request_id].feed(output)
        if delta.finish_reason is not None:
            del self._open[output.request_id]
            self._queue.end(output.request_id)  # it goes on where only a stop string ended it
        return delta

    def _best(self) -> Iterable[Choice]:
        """Return each prompt's likeliest choices, the likeliest first; all in their order where all are wanted."""
        num_sampled, num_choices = self._plan.num_sampled, self._plan.num_choices
        if num_sampled == num_choices:
            return self.choices
        groups = (self.choices[begin : begin + num_sampled] for begin in range(0, len(self.choices), num_sampled))
        ranked = (sorted(group, key=lambda choice: choice.mean_logprob, reverse=True) for group in groups)
        return [choice for group in ranked for choice in group[:num_choices]]

    def _join(self, index: int, source: Choice, deltas: Sequence[Delta]) -> Completion:
        last = deltas[-1]
        assert last.finish_reason is not None
        first_of_prompt = self.choices[source.index - source.index % self._plan.num_sampled]
        return Completion(
            index,
            source,
            "".join(delta.text for delta in deltas),
            last.finish_reason,
            last.stop_reason,
            [token_id for delta in deltas for token_id in delta.token_ids or ()],
            [entry for delta in deltas for entry in delta.entries],
            first_of_prompt.prompt_logprobs,
        )


def _requests(plan: GenerationPlan) -> list[Request]:
    """Return one engine request for each choice: those of one prompt share it and a seed.

    A prompt is scored with its first choice alone, unless each choice's text shows the scores.
    """
    pairs = [(prompt, choice) for prompt in plan.prompts for choice in range(plan.num_sampled)]
    is_shown = plan.text.echo and plan.text.logprobs
    others = replace(plan.sampling, prompt_logprobs=plan.sampling.prompt_logprobs if is_shown else None)
    return [
        Request(
            f"{plan.response_id}-{index}", prompt, replace(others if choice else plan.sampling, choice_index=choice)
        )
        for index, (prompt, choice) in enumerate(pairs)
    ]
