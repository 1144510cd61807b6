"""One API request's sequences on their way: token outputs in, pieces of text out."""

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from msgspec.structs import replace

from engine.protocol.messages import FinishReason, Request, SamplingParams, TokenOutput
from server.detokenizer import Detokenizer
from server.engine_client import EngineClient
from server.errors import APIError, engine_failed
from server.stop_strings import StopStrings
from server.token_bytes import TokenBytes


@dataclass(frozen=True)
class GenerationPlan:
    """What an API request asks for, in the engine's terms."""

    response_id: str
    prompts: list[list[int]]
    sampling: SamplingParams
    num_choices: int  # of each prompt
    stop: list[str]
    arrival: float  # of the API request, by `time.perf_counter`


@dataclass(frozen=True)
class Delta:
    """New text of one choice; its last one has a finish reason."""

    index: int
    text: str
    finish_reason: str | None


@dataclass
class Choice:
    """One sequence's text."""

    index: int
    detokenizer: Detokenizer
    stop: StopStrings
    num_tokens: int = field(default=0)

    def feed(self, output: TokenOutput) -> Delta:
        """Return what `output` adds.

        Raises:
            APIError: when the engine ended the sequence with an error.
        """
        if output.finish_reason is FinishReason.ERROR:
            raise engine_failed(output.error or "The engine could not finish this request.")
        self.num_tokens += len(output.token_ids)
        # A stop token is the sequence's last and has no text.
        ended_by_token = output.finish_reason is FinishReason.STOP
        text = self.detokenizer.feed(output.token_ids[:-1] if ended_by_token else output.token_ids)
        if output.finish_reason is not None:
            text += self.detokenizer.finish()
        text = self.stop.feed(text)
        if self.stop.found is not None:
            return Delta(self.index, text, FinishReason.STOP.value)
        if output.finish_reason is not None:
            return Delta(self.index, text + self.stop.finish(), output.finish_reason.value)
        return Delta(self.index, text, None)


class Generation:
    """All choices of one API request, numbered prompt by prompt."""

    def __init__(self, engine: EngineClient, token_bytes: TokenBytes, plan: GenerationPlan) -> None:
        self._engine = engine
        self._requests = _requests(plan)
        self._arrival = plan.arrival
        self._open = {
            request.request_id: Choice(
                index, Detokenizer(token_bytes, request.prompt_token_ids), StopStrings(plan.stop)
            )
            for index, request in enumerate(self._requests)
        }
        self.choices: Sequence[Choice] = tuple(self._open.values())
        self.num_prompt_tokens = sum(map(len, plan.prompts))

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
        inbox = self._engine.submit(self._requests, self._arrival)
        try:
            while self._open:
                deltas, error = self._feed_until_error(await inbox.take())
                if deltas:
                    yield deltas
                if error is not None:
                    raise error
        finally:
            self._engine.abort(self._open)

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
            self._engine.end(output.request_id)  # it goes on where only a stop string ended it
        return delta

    async def collect(self) -> list[Delta]:
        """Return each choice's whole text and finish reason.

        Raises:
            APIError: see `deltas`.
        """
        texts: list[list[str]] = [[] for _ in self.choices]
        reasons: list[str | None] = [None] * len(self.choices)
        async with aclosing(self.deltas()) as arriving:
            async for deltas in arriving:
                for delta in deltas:
                    texts[delta.index].append(delta.text)
                    reasons[delta.index] = delta.finish_reason or reasons[delta.index]
        return [Delta(index, "".join(texts[index]), reason) for index, reason in enumerate(reasons)]


def _requests(plan: GenerationPlan) -> list[Request]:
    """Return one engine request for each choice: `n` of them share a prompt and a seed."""
    pairs = [(prompt, choice) for prompt in plan.prompts for choice in range(plan.num_choices)]
    return [
        Request(f"{plan.response_id}-{index}", prompt, replace(plan.sampling, choice_index=choice))
        for index, (prompt, choice) in enumerate(pairs)
    ]
