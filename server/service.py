"""The served model: everything a route needs, put together once."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random, SystemRandom
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from engine.protocol.model_config import ModelConfig
from server.admission import AdmissionQueue
from server.api.checks import check_limits, check_prompts, check_vocabulary
from server.api.chunks import ChunkEncoder
from server.api.fields import shown
from server.api.logprobs import LogprobFormat
from server.api.requests import GenerationRequest
from server.api.responses import PromptLogprobs
from server.choice import TextOptions
from server.config import ServerConfig
from server.drain import Drain
from server.engine_client import EngineClient
from server.errors import APIError
from server.generation import Completion, Generation, GenerationPlan
from server.metrics.metrics import Metrics
from server.model_files import ModelFiles, SamplingDefaults
from server.sampling import sampling_params
from server.streams import Stream, StreamStore
from server.text.chat_template import ChatTemplate
from server.text.token_bytes import TokenBytes
from server.text.tokenizer import Tokenizer
from server.threads import in_daemon_thread
from server.tracing.base import Traces

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_LONG_WORK = 2  # texts tokenized or rendered beside the event loop at once
LONG_TEXT = 20_000  # characters that take some 10 ms to tokenize: too long to let every stream wait


@dataclass(frozen=True)
class TextModel:
    """The text side of a model directory."""

    name: str
    vocab_size: int
    dtype: str  # of the checkpoint's weights
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    sampling_defaults: SamplingDefaults
    stop_token_ids: tuple[int, ...]
    seeds: Random  # for requests that have none
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def load(cls, files: ModelFiles, server: ServerConfig, model: ModelConfig) -> "TextModel":
        """Read what `files` has not yet read of the model directory.

        Raises:
            ValueError: naming the file that cannot be used.
        """
        if files.ignored_defaults():
            logger.warning("generation_config.json: without effect: %s", ", ".join(files.ignored_defaults()))
        tokenizer = Tokenizer(files.directory)
        special_tokens = files.special_tokens()
        source = files.chat_template(server.chat_template)
        return cls(
            name=server.model_name(str(files.directory)),
            vocab_size=model.vocab_size,
            dtype=model.dtype,
            tokenizer=tokenizer,
            chat_template=None if source is None else ChatTemplate(source, special_tokens),
            sampling_defaults=files.sampling_defaults(),
            stop_token_ids=files.end_of_text_ids(model.vocab_size)
            or _end_of_text_id(tokenizer, special_tokens.get("eos_token")),
            seeds=SystemRandom() if server.seed is None else Random(server.seed % 2**64),  # Random takes -5 for 5
        )


def _end_of_text_id(tokenizer: Tokenizer, token: str | None) -> tuple[int, ...]:
    token_id = None if token is None else tokenizer.id_of(token)
    return () if token_id is None else (token_id,)


@dataclass(frozen=True)
class Prompts:
    """Prompts' token ids, and the field of the API request that they came from."""

    field: str
    ids: list[list[int]]


@dataclass(frozen=True)
class Service:
    """The model, and the engine that runs it."""

    model: TextModel
    queue: AdmissionQueue
    metrics: Metrics
    limits: ServerConfig
    streams: StreamStore
    drain: Drain = field(default_factory=Drain)
    traces: Traces = field(default_factory=Traces)
    long_work: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_LONG_WORK))

    @property
    def engine(self) -> EngineClient:
        """The link to the engine, behind the queue."""
        return self.queue.engine

    @property
    def max_model_len(self) -> int:
        """The longest prompt and completion together, in tokens; known once the engine is ready."""
        return self.engine.status.max_model_len

    def check_model(self, name: str | None) -> None:
        """Raise an `APIError` (404) unless `name` is this model's or was left out."""
        if name is not None and name != self.model.name:
            message = f"The model {shown(name)} does not exist; {self.model.name!r} is served here."
            raise APIError(message, status=404, param="model", code="model_not_found")

    def check(self, body: GenerationRequest) -> None:
        """Raise an `APIError` when `body` cannot be served whatever the tokens of its prompts are."""
        self.check_model(body.model)
        check_limits(body, self.limits)
        check_vocabulary(body, self.model.vocab_size)

    async def encode(
        self, body: GenerationRequest, param: str, texts: Sequence[str], *, add_special_tokens: bool
    ) -> list[list[int]]:
        """Return the token ids of each text of `body`.

        Raises:
            APIError: naming the field `param`, when a text is too long whatever its tokens are.
            APIError: (503) when the service ends meanwhile.
        """
        least = max(map(self.model.tokenizer.least_tokens, texts))
        if least >= self.max_model_len and body.truncate_prompt_tokens is None:
            raise _too_long(f"the prompt has at least {least} tokens, which leaves no room in it", self, param)
        return await self.tokenize(texts, add_special_tokens=add_special_tokens)

    async def tokenize(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Return each text's token ids, however many.

        Raises:
            APIError: (503) when the service ends meanwhile.
        """
        tokenizer = self.model.tokenizer
        if sum(map(len, texts)) <= LONG_TEXT:
            return [tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]
        return await self.aside(partial(tokenizer.encode_batch, texts, add_special_tokens=add_special_tokens))

    async def aside(self, work: Callable[[], T]) -> T:
        """Return what `work`, which takes long, returns; the event loop goes on meanwhile.

        Raises:
            APIError: (503) when the service ends meanwhile.
        """

        async def one_of_few() -> T:
            async with self.long_work:
                return await in_daemon_thread(work)

        return await self.engine.unless_closed(one_of_few())

    def generation(
        self,
        body: GenerationRequest,
        response_id: str,
        prompts: Prompts,
        max_tokens: int | None,
        arrival: float,
        key: str,
    ) -> Generation:
        """Return the generation that `body` asks for, not yet submitted.

        Args:
            body: the API request.
            response_id: its id.
            prompts: its prompts.
            max_tokens: how many tokens to generate where the request does not say; None: as many as fit.
            arrival: when it came, by `time.perf_counter`.
            key: name of the API key that it came with.

        Raises:
            APIError: naming the field, when the request cannot be served.
        """
        model = self.model
        name, limit = body.token_limit
        ids = self._truncate(body.truncate_prompt_tokens, prompts.ids, max_tokens if limit is None else limit)
        self.check_ids(Prompts(prompts.field, ids))
        limit = self._token_limit(body, max(map(len, ids)), prompts.field, max_tokens)
        if body.min_tokens is not None and body.min_tokens > limit:
            message = f"min_tokens: {body.min_tokens} is more than {name}, which is {limit}."
            raise APIError(message, param="min_tokens", code="invalid_value")
        plan = GenerationPlan(
            response_id,
            ids,
            sampling_params(body, model.sampling_defaults, model.stop_token_ids, limit, model.seeds),
            num_sampled=body.num_sampled,
            num_choices=body.num_choices,
            text=_text_options(body, scores_only=limit == 0),
            arrival=arrival,
            key=key,
            deadline=self._deadline(body, arrival),
        )
        return self.traces.new_generation(self.queue, self._spelling(body), plan)

    def stream(self, body: GenerationRequest, generation: Generation, encoder: ChunkEncoder, key: str) -> Stream:
        """Return `generation` as a stream of chunks, which only `key` may read."""
        return Stream(self.streams, generation, encoder, include_usage=body.include_usage, owner=key)

    def check_ids(self, prompts: Prompts) -> None:
        """Raise an `APIError` when a prompt has no tokens, or one that the model does not know."""
        check_prompts(prompts.field, prompts.ids, self.model.vocab_size)

    def logprob_format(self, num_top: int | None) -> LogprobFormat:
        """Return what writes log-probabilities, with those of the `num_top` likeliest tokens."""
        return LogprobFormat(self.model.tokenizer.token_bytes_with_special, num_top or 0)

    def prompt_logprobs(self, body: GenerationRequest, completion: Completion) -> PromptLogprobs | None:
        """Return what the answer says of the prompt's tokens, if `body` asks for it."""
        if body.prompt_logprobs is None:
            return None
        return self.logprob_format(body.prompt_logprobs).prompt(completion.prompt_logprobs)

    def _deadline(self, body: GenerationRequest, arrival: float) -> float | None:
        """Return when `body` is too late, by the clock of `arrival`."""
        limits = [seconds for seconds in (body.timeout, self.limits.request_timeout) if seconds is not None]
        return arrival + min(limits) if limits else None

    def _spelling(self, body: GenerationRequest) -> TokenBytes:
        tokenizer = self.model.tokenizer
        return tokenizer.token_bytes_with_special if body.skip_special_tokens is False else tokenizer.token_bytes

    def _truncate(self, keep: int | None, prompts: list[list[int]], max_tokens: int | None) -> list[list[int]]:
        """Return each prompt's last `keep` tokens, -1 being as many as leave room for what follows."""
        if keep is None:
            return prompts
        if keep == -1:
            keep = max(1, self.max_model_len - max(1, max_tokens or 1))
        frame = self.model.tokenizer.encode("", add_special_tokens=True)
        return [_last_tokens(prompt, keep, frame) for prompt in prompts]

    def _token_limit(self, body: GenerationRequest, prompt_len: int, prompt_field: str, default: int | None) -> int:
        """Return how many tokens may be generated for the longest prompt."""
        room = self.max_model_len - prompt_len
        if room < 1:
            raise _too_long(f"the prompt has {prompt_len} tokens, which leaves no room in it", self, prompt_field)
        name, limit = body.token_limit
        if limit is None:
            return room if default is None else min(default, room)
        if limit > room:
            raise _too_long(f"the prompt has {prompt_len} tokens and {name} is {limit}", self, name)
        return limit


def _last_tokens(prompt: list[int], count: int, frame: list[int]) -> list[int]:
    """Return the last `count` tokens, the begin-of-text frame that the prompt begins with among them if it fits."""
    if len(prompt) <= count:
        return prompt
    kept = frame if prompt[: len(frame)] == frame and len(frame) < count else []
    return kept + prompt[len(prompt) - count + len(kept) :]


def _text_options(body: GenerationRequest, *, scores_only: bool) -> TextOptions:
    return TextOptions(
        stop=tuple(body.stop),
        stop_token_ids=frozenset(body.stop_token_ids),
        include_stop=bool(body.include_stop_str_in_output),
        min_tokens=body.min_tokens or 0,
        echo=body.has_echo,
        scores_only=scores_only,
        logprobs=body.num_logprobs is not None,
        token_ids=bool(body.return_token_ids),
    )


def _too_long(problem: str, service: Service, param: str) -> APIError:
    message = f"This model's maximum context length is {service.max_model_len} tokens; {problem}."
    return APIError(message, param=param, code="context_length_exceeded")


async def _service(request: Request) -> Service:  # else FastAPI calls it in a thread
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


ServiceOf = Annotated[Service, Depends(_service)]
