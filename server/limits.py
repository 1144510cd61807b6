"""Bounds of what a request may ask for: those of arithmetic, and those that whoever serves the model sets."""

from dataclasses import dataclass, fields

from engine.protocol.config import option

MAX_TEMPERATURE = 100.0
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0  # what float32 logits bear
MAX_PENALTY = 2.0  # OpenAI's, of presence and frequency
MAX_LOGIT_BIAS = 100.0  # OpenAI's
INT64 = 2**63  # the first whole number that is too large
# Of lists and objects whose members are looked at one by one, on the event loop: their number is looked at before.
MAX_ITEMS = 2**16
MAX_TOKEN_IDS = 2**22  # more than any context has, and looked at faster
MIN_TIMEOUT, MAX_TIMEOUT = 0.001, 10**6  # seconds


@dataclass(frozen=True, kw_only=True)
class QueueLimits:
    """How much may wait for the engine, and how long.

    Raises:
        ValueError: naming the option, when a value is out of range.
    """

    max_queued_requests: int = option(1024, "most requests that wait for the engine; more are refused with 429")
    max_queued_tokens: int = option(2**22, "most tokens of the prompts that wait; more are refused with 429")
    request_timeout: float | None = option(
        None, "seconds after which a request ends with 504; requests may ask for less (timeout); no end when left out"
    )

    def __post_init__(self) -> None:
        most_of = {"max_queued_requests": 10**6, "max_queued_tokens": 10**9, "request_timeout": MAX_TIMEOUT}
        for name, most in most_of.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"--{name.replace('_', '-')} must be between 1 and {most}, not {value:g}")


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """The most that one request may ask for.

    Raises:
        ValueError: naming the option, when a value is out of range.
    """

    max_prompts: int = option(256, "most prompts in one request")
    max_choices: int = option(128, "most choices (n, best_of) for each prompt of a request")
    max_sequences: int = option(1024, "most choices of all of a request's prompts together")
    max_logprobs: int = option(20, "most of the likeliest tokens that a request may have logprobs of, at each position")
    max_logit_bias: int = option(1024, "most tokens in a request's logit_bias")
    max_stop_strings: int = option(16, "most stop strings of a request")
    max_stop_length: int = option(1024, "longest stop string, in characters")
    max_stop_token_ids: int = option(128, "most stop tokens of a request besides the model's")

    def __post_init__(self) -> None:
        for item in fields(RequestLimits):
            value = getattr(self, item.name)
            if not 1 <= value <= MAX_ITEMS:
                raise ValueError(f"--{item.name.replace('_', '-')} must be between 1 and {MAX_ITEMS}, not {value}")
