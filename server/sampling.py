"""The API's sampling fields → the engine's `SamplingParams`."""

from random import Random

from engine.protocol.messages import SamplingParams
from server.api.requests import GenerationRequest
from server.model_files import SamplingDefaults

GREEDY_BELOW = 1e-5  # a temperature under which dividing by it leaves float32's range


def sampling_params(
    body: GenerationRequest,
    defaults: SamplingDefaults,
    stop_token_ids: tuple[int, ...],
    max_tokens: int,
    seeds: Random,
) -> SamplingParams:
    """Return what `body` asks for; what it leaves open is the model's default, and a seed is drawn from `seeds`."""
    stop_ids = () if body.ignore_eos else stop_token_ids
    seed = (seeds.getrandbits(64) if body.seed is None else body.seed) % 2**64
    temperature = defaults.temperature if body.temperature is None else body.temperature
    if temperature < GREEDY_BELOW:
        return SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=seed, stop_token_ids=stop_ids)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        top_k=max(0, defaults.top_k if body.top_k is None else body.top_k),
        min_p=defaults.min_p if body.min_p is None else body.min_p,
        seed=seed,
        stop_token_ids=stop_ids,
    )
