"""A conversation → its prompt's text."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from server.errors import APIError
from server.service import LONG_TEXT, Service
from server.text.chat_template import ChatTemplate, ChatTemplateError

MESSAGE_LENGTH = 100  # characters of text that take as long as a message's own turn in a template


async def chat_prompt(
    service: Service,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    kwargs: Mapping[str, Any],
) -> str:
    """Return what `ChatTemplate.render` does; of a long conversation, beside the event loop.

    Raises:
        APIError: naming the field, when the model has no template, or its template refuses.
        APIError: (503) when the service ends meanwhile.
    """
    work = partial(
        _template(service).render,
        messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        kwargs=kwargs,
    )
    length = sum(MESSAGE_LENGTH + len(message["content"]) for message in messages) + len(repr(kwargs))
    try:
        return work() if length <= LONG_TEXT else await service.aside(work)
    except ChatTemplateError as error:
        raise APIError(f"{error.param}: {error}", param=error.param, code="invalid_value") from error


def _template(service: Service) -> ChatTemplate:
    if service.model.chat_template is None:
        raise APIError(
            "The model has no chat template: use /v1/completions, or serve it with --chat-template.",
            param="messages",
            code="no_chat_template",
        )
    return service.model.chat_template
