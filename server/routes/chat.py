"""`POST /v1/chat/completions`."""

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.chunks import ChatChunks
from server.api.requests import ChatCompletionRequest
from server.api.responses import AssistantMessage, ChatChoice, ChatCompletionResponse, Usage
from server.chat_prompt import chat_prompt
from server.routes.documentation import GENERATION_RESPONSES
from server.service import Prompts, ServiceOf
from server.streaming import EventStream, collect, events_of, usage_of

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletionResponse,
    responses=GENERATION_RESPONSES,
    tags=["generation"],
    summary="Answer a conversation",
)
async def create_chat_completion(body: ChatCompletionRequest, request: Request, service: ServiceOf) -> Any:
    """Return the assistant's next message, whole or as a stream."""
    arrival = time.perf_counter()
    service.engine.require_ready()
    service.check_model(body.model)
    prompt = await chat_prompt(
        service,
        [message.for_template() for message in body.messages],
        add_generation_prompt=True,
        continue_final_message=False,
        kwargs={},
    )
    ids = await service.encode("messages", [prompt], add_special_tokens=False)
    response_id = f"chatcmpl-{uuid.uuid4().hex}"
    generation = service.generation(body, response_id, Prompts("messages", ids), None, arrival)
    if body.stream:
        chunks = ChatChunks(response_id, service.model.name, body.include_usage)
        return EventStream(events_of(generation, chunks, body.include_usage))
    created = int(time.time())
    choices = await collect(request, generation)
    answer = ChatCompletionResponse(
        id=response_id,
        created=created,
        model=service.model.name,
        choices=[
            ChatChoice(index=c.index, message=AssistantMessage(content=c.text), finish_reason=c.finish_reason)
            for c in choices
        ],
        usage=Usage(**usage_of(generation)),
    )
    return Response(answer.model_dump_json(), media_type="application/json")
