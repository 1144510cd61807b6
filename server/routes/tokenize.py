"""`POST /tokenize` and `/detokenize`. They need the tokenizer alone, and answer while the model is still loading."""

from functools import partial
from typing import Any

from fastapi import APIRouter
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
    answer = TokenizeResponse(
        count=len(ids),
        max_model_len=service.max_model_len or None,
        tokens=ids,
        token_strs=service.model.tokenizer.token_strs(ids) if body.return_token_strs else None,
    )
    return Response(answer.model_dump_json(), media_type="application/json")


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
    work = partial(service.model.tokenizer.decode, body.tokens)
    text = work() if len(body.tokens) <= LONG_TEXT else await service.aside(work)
    return Response(DetokenizeResponse(prompt=text).model_dump_json(), media_type="application/json")
