"""`POST /v1/completions`."""

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.chunks import CompletionChunks
from server.api.logprobs import LogprobFormat
from server.api.requests import CompletionRequest
from server.api.responses import CompletionChoice, CompletionResponse
from server.generation import Completion
from server.middleware.auth import key_name
from server.routes.documentation import GENERATION_RESPONSES
from server.service import Prompts, Service, ServiceOf
from server.streaming import EventStream, collect
from server.streams import usage_of

DEFAULT_MAX_TOKENS = 16  # OpenAI's

router = APIRouter()


@router.post(
    "/v1/completions",
    response_model=CompletionResponse,
    responses=GENERATION_RESPONSES,
    tags=["generation"],
    summary="Continue a text",
)
async def create_completion(body: CompletionRequest, request: Request, service: ServiceOf) -> Any:
    """Return the text that follows each prompt, whole or as a stream."""
    arrival = time.perf_counter()
    service.check(body)
    prompts = Prompts("prompt", await _prompt_ids(body, service))
    response_id = f"cmpl-{uuid.uuid4().hex}"
    generation = service.generation(body, response_id, prompts, DEFAULT_MAX_TOKENS, arrival, key_name(request.scope))
    logprobs = service.logprob_format(body.num_logprobs)
    if body.stream:
        chunks = CompletionChunks(response_id, service.model.name, logprobs, body.include_usage)
        return EventStream(service.streams, service.stream(body, generation, chunks, key_name(request.scope)))
    created = int(time.time())
    completions = await collect(request, generation)
    answer = CompletionResponse(
        id=response_id,
        created=created,
        model=service.model.name,
        choices=[_choice(body, completion, service, logprobs) for completion in completions],
        usage=usage_of(generation),
    )
    return Response(answer.model_dump_json(), media_type="application/json")


async def _prompt_ids(body: CompletionRequest, service: Service) -> list[list[int]]:
    """Return the prompts' ids; ids that the request has are taken as they are."""
    texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
    if texts:
        return await service.encode(body, "prompt", texts, add_special_tokens=body.add_special_tokens is not False)
    return [prompt for prompt in body.prompt if isinstance(prompt, list)]


def _choice(
    body: CompletionRequest, completion: Completion, service: Service, logprobs: LogprobFormat
) -> CompletionChoice:
    return CompletionChoice(
        index=completion.index,
        text=completion.text,
        logprobs=None if body.num_logprobs is None else logprobs.completion(completion.entries),
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        token_ids=completion.token_ids if body.return_token_ids else None,
        prompt_token_ids=completion.source.prompt_token_ids if body.return_token_ids else None,
        prompt_logprobs=service.prompt_logprobs(body, completion),
    )
