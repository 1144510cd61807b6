"""What a step brought, as the scheduler takes it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.protocol.messages import TokenLogprobs


@dataclass(frozen=True)
class StepResult:
    """Results of one step, by request id."""

    tokens: Mapping[str, int | str] = field(default_factory=dict)  # sampled, or a message why none could be
    logprobs: Mapping[str, TokenLogprobs] = field(default_factory=dict)  # of sampled tokens, for those who ask
    prompt_logprobs: Mapping[str, list[TokenLogprobs]] = field(default_factory=dict)  # of the prompt
