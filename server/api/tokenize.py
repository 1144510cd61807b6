"""What `POST /tokenize` and `/detokenize` take and answer: vLLM's shapes."""

from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from server.api.fields import RequestModel, Text, Variables, at_most, neutral
from server.api.requests import Messages, about
from server.limits import MAX_TOKEN_IDS

# Fields that say nothing of a prompt, and their neutral values.
_OF_MESSAGES = {"add_generation_prompt": True, "continue_final_message": False, "chat_template_kwargs": {}}


class TokenizeRequest(RequestModel):
    """Body of `POST /tokenize`: a `prompt`, or `messages` that become one."""

    model: Text | None = Field(None, description="The served model's name; may be left out.")
    prompt: Text | None = Field(None, description="A text.")
    messages: Messages | None = Field(
        None, min_length=1, description="A conversation, which becomes a text by the model's chat template."
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Frame the text as the tokenizer does, such as by a begin-of-text token. Left out: a prompt is "
        "framed, messages are not, since chat templates write the frame.",
    )
    return_token_strs: bool | None = Field(None, description="Return each token as the vocabulary spells it.")
    add_generation_prompt: bool | None = Field(
        None, description="Only with `messages`: end with the beginning of an answer. True when left out."
    )
    continue_final_message: bool | None = Field(
        None, description="Only with `messages`: end with the final message's text, so that it goes on."
    )
    chat_template_kwargs: Variables = Field(
        {}, description="Only with `messages`: values of the chat template's own variables."
    )
    chat_template: Annotated[Any, neutral()] = None
    tools: Annotated[Any, neutral([])] = None

    @model_validator(mode="after")
    def _check_input(self) -> "TokenizeRequest":
        if self.prompt is None and self.messages is None:
            raise about("prompt", "is missing, and so is messages: one of them is needed")
        if self.prompt is not None and self.messages is not None:
            raise about("messages", "cannot be combined with prompt")
        for name, neutral_value in _OF_MESSAGES.items():
            if self.prompt is not None and getattr(self, name) not in (None, neutral_value):
                raise about(name, "is only allowed with messages")
        return self


class TokenizeResponse(BaseModel):
    """Answer of `POST /tokenize`."""

    count: int
    max_model_len: int | None = Field(description="The longest prompt and completion together; null while it loads.")
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestModel):
    """Body of `POST /detokenize`."""

    model: Text | None = Field(None, description="The served model's name; may be left out.")
    tokens: Annotated[list[int], Field(fail_fast=True), at_most(MAX_TOKEN_IDS)] = Field(description="Token ids.")


class DetokenizeResponse(BaseModel):
    """Answer of `POST /detokenize`."""

    prompt: str
