"""A generation that records when it waited, computed its prompt, generated, and waited for other ranks."""

from collections.abc import Iterable

from opentelemetry.util.types import AttributeValue

from engine.protocol.messages import GroupState, TokenOutput
from server.admission import AdmissionQueue
from server.choice import Delta
from server.errors import APIError
from server.generation import Completion, Generation, GenerationPlan
from server.text.token_bytes import TokenBytes
from server.tracing.request import RequestTrace, at, now


class TracedGeneration(Generation):
    """See `Generation`. Its request's span has four kinds of children.

    These are `queue` until the engine first computes something of it, `prefill` from there to the first token,
    `decode` from there to the last, and over these `recovery`, from the loss of a rank group to the first output
    afterwards.
    """

    def __init__(
        self, queue: AdmissionQueue, token_bytes: TokenBytes, plan: GenerationPlan, trace: RequestTrace
    ) -> None:
        super().__init__(queue, token_bytes, plan)
        self._trace = trace
        self._is_streamed = True
        self._submitted: int | None = None
        self._scheduled: int | None = None
        self._first_token: int | None = None
        self._last_token = 0
        self._finish_reasons: list[str] = []
        self._epoch = _epoch_that_was_ready(queue)
        trace.follow(self)
        trace.set(_request_attributes(plan))

    def submit(self) -> None:
        """See `Generation`."""
        if self._submitted is None:
            self._submitted = now()
        super().submit()

    async def next(self) -> list[Delta]:
        """See `Generation`."""
        try:
            return await super().next()
        except APIError as error:
            self._trace.fail(error)
            raise

    async def collect(self) -> list[Completion]:
        """See `Generation`."""
        self._is_streamed = False
        return await super().collect()

    def note_end(self) -> None:
        """Record what there is to say at the request's end."""
        if self._submitted is None:
            return
        end = now()
        self._note_recovery(end)
        if self._scheduled is None:
            self._trace.add_child("queue", self._submitted, end, {})
        elif self._first_token is None:
            self._trace.add_child("prefill", self._scheduled, end, {})
        else:
            tokens = {"gen_ai.usage.output_tokens": self.num_completion_tokens}
            self._trace.add_child("decode", self._first_token, self._last_token, tokens)
        self._trace.set(self._response_attributes(self._submitted))

    def _feed_all(self, outputs: Iterable[TokenOutput]) -> list[Delta]:
        outputs, arrival = list(outputs), now()
        for output in outputs:
            self._note(output, arrival)
        return super()._feed_all(outputs)

    def _feed(self, output: TokenOutput) -> Delta:
        delta = super()._feed(output)
        if delta.finish_reason is not None:
            self._finish_reasons.append(delta.finish_reason)
        return delta

    def _note(self, output: TokenOutput, arrival: int) -> None:
        resumed = self._note_recovery(arrival)
        if self._scheduled is None and output.queue_seconds is not None:
            self._note_scheduled(output.queue_seconds, resumed, arrival)
        if output.token_ids:
            self._last_token = arrival
            if self._first_token is None:
                self._first_token = arrival
                tokens = {
                    "gen_ai.usage.input_tokens": self.num_prompt_tokens,
                    "gen_ai.usage.cache_read.input_tokens": output.num_cached_tokens or 0,
                }
                self._trace.add_child("prefill", self._scheduled or arrival, arrival, tokens)

    def _note_scheduled(self, queue_seconds: float, resumed: int, arrival: int) -> None:
        """Record how long it waited: here, and then in the engine, which was given it again where it `resumed`."""
        assert self._inbox is not None
        assert self._inbox.given_at is not None
        assert self._submitted is not None
        given = max(resumed, at(self._inbox.given_at))
        self._scheduled = min(given + int(queue_seconds * 1e9), arrival)
        self._trace.add_child("queue", self._submitted, self._scheduled, {})

    def _note_recovery(self, arrival: int) -> int:
        """Record a loss since the last output; return when the group that took over was ready, 0 if there was none."""
        engine = self._queue.engine
        recovery = engine.last_recovery
        if engine.status.epoch == self._epoch or recovery is None or self._submitted is None:
            return 0
        self._epoch = engine.status.epoch
        lost = int(recovery.noticed_at * 1e9)
        attributes: dict[str, AttributeValue] = {
            "ryzanstein.recovery.cause": recovery.cause,
            "ryzanstein.recovery.kind": recovery.kind,
            "ryzanstein.recovery.epoch": self._epoch,
        }
        attributes |= {f"ryzanstein.recovery.{phase}_seconds": value for phase, value in recovery.seconds.items()}
        self._trace.add_child("recovery", max(self._submitted, lost), arrival, attributes)
        return lost + int(sum(recovery.seconds.values()) * 1e9)

    def _response_attributes(self, submitted: int) -> dict[str, AttributeValue]:
        attributes: dict[str, AttributeValue] = {
            "gen_ai.request.stream": self._is_streamed,
            "gen_ai.usage.input_tokens": self.num_prompt_tokens,
            "gen_ai.usage.output_tokens": self.num_completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": self.num_cached_tokens,
        }
        if self._finish_reasons:
            attributes["gen_ai.response.finish_reasons"] = self._finish_reasons
        if self._is_streamed and self._first_token is not None:
            attributes["gen_ai.response.time_to_first_chunk"] = (self._first_token - submitted) / 1e9
        return attributes


def _epoch_that_was_ready(queue: AdmissionQueue) -> int:
    """Return the last epoch whose group was ready: while there is none, its successor's is told already."""
    status = queue.engine.status
    return status.epoch - (status.state is not GroupState.READY)


def _request_attributes(plan: GenerationPlan) -> dict[str, AttributeValue]:
    sampling = plan.sampling
    attributes: dict[str, AttributeValue] = {
        "gen_ai.response.id": plan.response_id,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
    }
    if sampling.top_k:
        attributes["gen_ai.request.top_k"] = sampling.top_k
    if plan.num_choices != 1:
        attributes["gen_ai.request.choice.count"] = plan.num_choices
    for name in ("frequency_penalty", "presence_penalty"):
        if value := getattr(sampling, name):
            attributes[f"gen_ai.request.{name}"] = value
    return attributes
