"""The API's sampling fields → the engine's `SamplingParams`."""

from random import Random
from typing import TypeVar

from engine.protocol.messages import SamplingParams
from server.api.requests import GenerationRequest
from server.model_files import SamplingDefaults

GREEDY_BELOW = 1e-5  # a temperature under which dividing by it leaves float32's range

T = TypeVar("T")


def sampling_params(
    body: GenerationRequest,
    defaults: SamplingDefaults,
    stop_token_ids: tuple[int, ...],
    max_tokens: int,
    seeds: Random,
) -> SamplingParams:
    """Return what `body` asks for; what it leaves open is the model's default, and a seed is drawn from `seeds`."""
    temperature = _or(body.temperature, defaults.temperature)
    is_greedy = temperature < GREEDY_BELOW
    return SamplingParams(
        max_tokens=max(1, max_tokens),
        min_tokens=_or(body.min_tokens, 0),
        temperature=0.0 if is_greedy else temperature,
        top_p=1.0 if is_greedy else _or(body.top_p, defaults.top_p),
        top_k=0 if is_greedy else max(0, _or(body.top_k, defaults.top_k)),
        min_p=0.0 if is_greedy else _or(body.min_p, defaults.min_p),
        seed=(seeds.getrandbits(64) if body.seed is None else body.seed) % 2**64,
        stop_token_ids=tuple(dict.fromkeys((*body.stop_token_ids, *(() if body.ignore_eos else stop_token_ids)))),
        logit_bias=body.logit_bias,
        repetition_penalty=_or(body.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        logprobs=_most(body.num_logprobs, 0 if body.num_sampled > body.num_choices else None),
        prompt_logprobs=_most(body.prompt_logprobs, body.num_logprobs if body.has_echo else None),
    )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _most(*counts: int | None) -> int | None:
    """Return the largest of the counts that are given."""
    return max((count for count in counts if count is not None), default=None)
