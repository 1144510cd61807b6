"""`POST /v1/chat/completions`."""

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.chunks import ChatChunks
from server.api.logprobs import LogprobFormat
from server.api.requests import ChatCompletionRequest
from server.api.responses import AssistantMessage, ChatChoice, ChatCompletionResponse
from server.chat_prompt import chat_prompt
from server.generation import Completion
from server.middleware.auth import key_name
from server.routes.documentation import GENERATION_RESPONSES
from server.service import Prompts, ServiceOf
from server.streaming import EventStream, collect
from server.streams import usage_of

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
    service.check(body)
    prompt = await chat_prompt(
        service,
        [message.for_template() for message in body.messages],
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        kwargs=body.chat_template_kwargs,
    )
    ids = await service.encode(body, "messages", [prompt], add_special_tokens=bool(body.add_special_tokens))
    response_id = f"chatcmpl-{uuid.uuid4().hex}"
    generation = service.generation(body, response_id, Prompts("messages", ids), None, arrival, key_name(request.scope))
    logprobs = service.logprob_format(body.num_logprobs)
    if body.stream:
        chunks = ChatChunks(response_id, service.model.name, logprobs, body.include_usage)
        return EventStream(service.streams, service.stream(body, generation, chunks, key_name(request.scope)))
    created = int(time.time())
    completions = await collect(request, generation)
    answer = ChatCompletionResponse(
        id=response_id,
        created=created,
        model=service.model.name,
        choices=[_choice(body, completion, logprobs) for completion in completions],
        usage=usage_of(generation),
        prompt_token_ids=completions[0].source.prompt_token_ids if body.return_token_ids else None,
        prompt_logprobs=service.prompt_logprobs(body, completions[0]),
    )
    return Response(answer.model_dump_json(), media_type="application/json")


def _choice(body: ChatCompletionRequest, completion: Completion, logprobs: LogprobFormat) -> ChatChoice:
    return ChatChoice(
        index=completion.index,
        message=AssistantMessage(content=completion.text),
        logprobs=logprobs.chat(completion.entries) if body.logprobs else None,
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        token_ids=completion.token_ids if body.return_token_ids else None,
    )
