"""One API request's sequences on their way: token outputs in, pieces of text out."""

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from msgspec.structs import replace

from engine.protocol.messages import Request, SamplingParams, TokenLogprobs, TokenOutput
from server.admission import AdmissionQueue
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
    """All choices of one API request, numbered prompt by prompt."""

    def __init__(self, queue: AdmissionQueue, token_bytes: TokenBytes, plan: GenerationPlan) -> None:
        self._queue = queue
        self._plan = plan
        self._requests = _requests(plan)
        self._open = {
            request.request_id: Choice(index, request, plan.text, token_bytes)
            for index, request in enumerate(self._requests)
        }
        self.choices: Sequence[Choice] = tuple(self._open.values())

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

    async def deltas(self) -> AsyncGenerator[list[Delta], None]:
        """Submit the request and yield what arrived, until every choice has finished.

        However this ends, what the engine has not finished then is aborted. What arrived before an error is yielded
        before it is raised.

        Raises:
            APIError: when the engine takes no requests, or could not finish one.
        """
        inbox = self._queue.submit(self._requests, self._plan.arrival, self._plan.key, self._plan.deadline)
        try:
            while self._open:
                deltas, error = self._feed_until_error(await inbox.take())
                if deltas:
                    yield deltas
                if error is not None:
                    raise error
        finally:
            self._queue.abort(self._open)

    def _feed_until_error(self, outputs: Iterable[TokenOutput]) -> tuple[list[Delta], APIError | None]:
        deltas: list[Delta] = []
        for output in outputs:
            if output.request_id not in self._open:
                continue
            try:
                deltas.append(self._feed(output))
            except APIError as error:
                return deltas, error
        return deltas, None

    def _feed(self, output: TokenOutput) -> Delta:
        delta = self._open[output.request_id].feed(output)
        if delta.finish_reason is not None:
            del self._open[output.request_id]
            self._queue.end(output.request_id)  # it goes on where only a stop string ended it
        return delta

    async def collect(self) -> list[Completion]:
        """Return the whole of every choice that is wanted.

        Raises:
            APIError: see `deltas`.
        """
        parts: list[list[Delta]] = [[] for _ in self.choices]
        async with aclosing(self.deltas()) as arriving:
            async for deltas in arriving:
                for delta in deltas:
                    parts[delta.index].append(delta)
        return [self._join(index, choice, parts[choice.index]) for index, choice in enumerate(self._best())]

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
