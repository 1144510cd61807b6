"""`POST /v1/completions`."""

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.chunks import CompletionChunks
from server.api.requests import CompletionRequest
from server.api.responses import CompletionChoice, CompletionResponse, Usage
from server.routes.documentation import GENERATION_RESPONSES
from server.service import Prompts, Service, ServiceOf
from server.streaming import EventStream, collect, events_of, usage_of

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
    service.engine.require_ready()
    service.check_model(body.model)
    prompts = Prompts("prompt", await _prompt_ids(body, service))
    response_id = f"cmpl-{uuid.uuid4().hex}"
    generation = service.generation(body, response_id, prompts, DEFAULT_MAX_TOKENS, arrival)
    if body.stream:
        chunks = CompletionChunks(response_id, service.model.name, body.include_usage)
        return EventStream(events_of(generation, chunks, body.include_usage))
    created = int(time.time())
    choices = await collect(request, generation)
    answer = CompletionResponse(
        id=response_id,
        created=created,
        model=service.model.name,
        choices=[CompletionChoice(index=c.index, text=c.text, finish_reason=c.finish_reason) for c in choices],
        usage=Usage(**usage_of(generation)),
    )
    return Response(answer.model_dump_json(), media_type="application/json")


async def _prompt_ids(body: CompletionRequest, service: Service) -> list[list[int]]:
    """Return the prompts' ids; texts are framed as the tokenizer does, ids are taken as they are."""
    texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
    if texts:
        return await service.encode("prompt", texts, add_special_tokens=True)
    return [prompt for prompt in body.prompt if isinstance(prompt, list)]
