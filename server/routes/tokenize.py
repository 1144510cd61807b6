"""`POST /tokenize` and `/detokenize`. They need the tokenizer alone, and answer while the model is still loading."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from server.api.checks import check_prompts
from server.api.tokenize import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from server.chat_prompt import chat_prompt
from server.routes.documentation import TEXT_RESPONSES
from server.service import LONG_TEXT, Service, ServiceOf

router = APIRouter(tags=["text"])


@router.post("/tokenize", response_model=TokenizeResponse, responses=TEXT_RESPONSES, summary="Text to token ids")
async def tokenize(body: TokenizeRequest, service: ServiceOf) -> Any:
    """Return the ids of a text's or a conversation's tokens, and how many there are."""
    service.check_model(body.model)
    text = await _text(body, service)
    is_framed = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
    (ids,) = await service.tokenize([text], add_special_tokens=is_framed)
    tokenizer = service.model.tokenizer

    def answer() -> TokenizeResponse:
        token_strs = tokenizer.token_strs(ids) if body.return_token_strs else None
        length = service.max_model_len or None
        return TokenizeResponse(count=len(ids), max_model_len=length, tokens=ids, token_strs=token_strs)

    return await _respond(service, len(ids), answer)


async def _text(body: TokenizeRequest, service: Service) -> str:
    if body.messages is None:
        assert body.prompt is not None
        return body.prompt
    return await chat_prompt(
        service,
        [message.for_template() for message in body.messages],
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        kwargs=body.chat_template_kwargs,
    )


@router.post("/detokenize", response_model=DetokenizeResponse, responses=TEXT_RESPONSES, summary="Token ids to text")
async def detokenize(body: DetokenizeRequest, service: ServiceOf) -> Any:
    """Return the text that the tokens spell, special tokens written out."""
    service.check_model(body.model)
    check_prompts("tokens", [body.tokens], service.model.vocab_size)
    tokenizer = service.model.tokenizer
    return await _respond(service, len(body.tokens), lambda: DetokenizeResponse(prompt=tokenizer.decode(body.tokens)))


async def _respond(service: Service, num_tokens: int, answer: Callable[[], BaseModel]) -> Response:
    """Return what `answer` makes; of many tokens, beside the event loop."""

    def content() -> str:
        return answer().model_dump_json()

    made = content() if num_tokens <= LONG_TEXT else await service.aside(content)
    return Response(made, media_type="application/json")
