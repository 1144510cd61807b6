"""What a request may ask for, besides what its fields' types say: the service's limits, and the model's vocabulary."""

from collections.abc import Iterable, Sequence

from server.api.fields import shortened
from server.api.requests import ChatCompletionRequest, CompletionRequest, GenerationRequest
from server.errors import APIError
from server.limits import RequestLimits


def check_limits(body: GenerationRequest, limits: RequestLimits) -> None:
    """Raise an `APIError` that names the first field in which `body` asks for more than `limits` allow."""
    for param, unit, asked, most in (*_counts(body, limits), *_own_counts(body, limits)):
        if asked is not None and asked > most:
            raise _invalid(param, f"asks for {asked} {unit}; at most {most} are allowed here.")


_Counts = Iterable[tuple[str, str, int | None, int]]  # field, what it counts, how many, the most


def _counts(body: GenerationRequest, limits: RequestLimits) -> _Counts:
    yield "n", "choices", body.n, limits.max_choices
    yield "prompt_logprobs", "likeliest tokens", body.prompt_logprobs, limits.max_logprobs
    yield "logit_bias", "biases", len(body.logit_bias), limits.max_logit_bias
    yield "stop_token_ids", "stop tokens", len(body.stop_token_ids), limits.max_stop_token_ids
    yield "stop", "stop strings", len(body.stop), limits.max_stop_strings
    for index, stop in enumerate(body.stop):
        yield f"stop[{index}]", "characters", len(stop), limits.max_stop_length


def _own_counts(body: GenerationRequest, limits: RequestLimits) -> _Counts:
    """Yield those of fields that only one of the endpoints has."""
    if isinstance(body, CompletionRequest):
        yield "prompt", "prompts", len(body.prompt), limits.max_prompts
        yield "best_of", "choices", body.best_of, limits.max_choices
        yield "logprobs", "likeliest tokens", body.logprobs, limits.max_logprobs
        name = "n" if body.best_of is None else "best_of"
        yield name, "choices of all prompts", len(body.prompt) * body.num_sampled, limits.max_sequences
    elif isinstance(body, ChatCompletionRequest):
        yield "top_logprobs", "likeliest tokens", body.top_logprobs, limits.max_logprobs
        yield "n", "choices", body.n, limits.max_sequences


def check_vocabulary(body: GenerationRequest, vocab_size: int) -> None:
    """Raise an `APIError` that names the field in which `body` has a token id that the model does not know."""
    _check_ids("stop_token_ids", body.stop_token_ids, vocab_size)
    _check_ids("logit_bias", list(body.logit_bias), vocab_size)


def check_prompts(param: str, prompts: Iterable[Sequence[int]], vocab_size: int) -> None:
    """Raise an `APIError` that names the field `param`, when a prompt has no tokens or one that does not exist."""
    for prompt in prompts:
        if not prompt:
            raise _invalid(param, "has no tokens.")
        _check_ids(param, prompt, vocab_size)


def _check_ids(param: str, token_ids: Sequence[int], vocab_size: int) -> None:
    for wrong in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= wrong < vocab_size:
            raise _invalid(param, f"token id {shortened(str(wrong))} is outside the vocabulary of {vocab_size}.")


def _invalid(param: str, message: str) -> APIError:
    return APIError(f"{param}: {message}", param=param, code="invalid_value")
