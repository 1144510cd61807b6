"""What is known here of each sequence that the engine works on: enough to have another engine go on with it."""

import asyncio
from dataclasses import dataclass, field

from msgspec.structs import replace

from engine.protocol.messages import Request, TokenOutput


class Inbox:
    """Outputs that wait for one API request, all its sequences together."""

    def __init__(self) -> None:
        self._outputs: list[TokenOutput] = []
        self._arrived = asyncio.Event()

    def put(self, output: TokenOutput) -> None:
        """Add an output."""
        self._outputs.append(output)
        self._arrived.set()

    async def take(self) -> list[TokenOutput]:
        """Wait until there is something, and return all there is."""
        await self._arrived.wait()
        self._arrived.clear()
        taken, self._outputs = self._outputs, []
        return taken


@dataclass(eq=False)
class Flight:
    """One sequence on its way, from its submission to its last output.

    The engine knows it by `wire_id`, another one for each time that it is sent: what is still on the way of an earlier
    time is told apart by that.
    """

    request: Request  # as it was submitted
    inbox: Inbox
    arrival: float  # of the API request, by `time.perf_counter`
    begun: float  # to wait, in the server's queue or here, by the same clock
    wire_id: str = ""  # nothing while it waits to be sent
    token_ids: list[int] = field(init=False)  # received
    num_prompt_logprobs: int = field(init=False)  # received
    has_begun: bool = field(init=False)  # something was received
    sent: float = 0.0  # when it was, by the same clock
    first_step: float | None = None  # about when the engine began with it
    first_token: float | None = None  # when that came, if it came to this flight
    last_token: float | None = None  # when the last one came
    num_losses: int = 0  # groups that died in a step with it since it last got a token

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.received_token_ids)
        self.num_prompt_logprobs = self.request.num_received_prompt_logprobs
        self.has_begun = bool(self.token_ids) or self.num_prompt_logprobs > 0

    @property
    def request_id(self) -> str:
        """What whoever submitted it calls it."""
        return self.request.request_id

    @property
    def rest(self) -> Request:
        """The request for what has not been received yet."""
        return replace(
            self.request, received_token_ids=self.token_ids, num_received_prompt_logprobs=self.num_prompt_logprobs
        )

    def send_as(self, wire_id: str) -> Request:
        """Return what goes to the engine, which calls it `wire_id`."""
        self.wire_id = wire_id
        return replace(self.rest, request_id=wire_id)

    def take(self, output: TokenOutput) -> TokenOutput:
        """Note what came; return it as if one engine had sent all of it."""
        if output.request_id != self.request_id:
            output = replace(output, request_id=self.request_id)
        if self.has_begun and output.queue_seconds is not None:  # the first output after a loss
            output = replace(output, queue_seconds=None, num_cached_tokens=None)
        self.has_begun = True
        self.token_ids.extend(output.token_ids)
        self.num_prompt_logprobs += len(output.prompt_logprobs)
        return output
