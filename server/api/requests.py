"""What `POST /v1/completions` and `/v1/chat/completions` take.

A field works, or only its neutral values are accepted: nothing with an effect is taken and ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.fields import Content, Prompt, RequestModel, Stop, Text, neutral
from server.limits import INT64, MAX_TEMPERATURE

MAX_CHOICES = 128

Count = Annotated[int, Field(ge=1, le=INT64 - 1)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
WrittenRole = Literal["system", "developer", "user", "assistant"]
FreeForm = Annotated[Any, Field(description="Accepted; it has no effect on the result.")]


class StreamOptions(RequestModel):
    """What a stream holds besides text."""

    include_usage: bool | None = Field(None, description="End the stream with a chunk that holds the token counts.")
    include_obfuscation: Annotated[Any, neutral(False)] = None
    continuous_usage_stats: Annotated[Any, neutral(False)] = None


class GenerationRequest(RequestModel):
    """Fields of both endpoints."""

    model: Text | None = Field(None, description="The served model's name; may be left out.")
    max_tokens: Count | None = Field(None, description="Most tokens to generate for each choice.")
    temperature: float | None = Field(
        None, ge=0, le=MAX_TEMPERATURE, allow_inf_nan=False, description="0 takes the likeliest token each time."
    )
    top_p: Share | None = Field(None, description="Take only the likeliest tokens that make up this probability.")
    top_k: int | None = Field(None, ge=-1, le=INT64 - 1, description="Take only the k likeliest tokens; 0, -1: all.")
    min_p: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="Least probability, as a share of the likeliest token's."
    )
    seed: int | None = Field(None, ge=-INT64, le=INT64 - 1, description="Same seed and request, same text.")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Choices for each prompt.")
    stop: Stop = Field([], description="Up to 16 strings; the text ends before the first that appears.")
    ignore_eos: bool | None = Field(None, description="Go on after the end-of-text token.")
    stream: bool | None = Field(None, description="Send the text as server-sent events while it is generated.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    user: Text | None = Field(None, description="Accepted; it has no effect on the result.")
    metadata: FreeForm = None

    frequency_penalty: Annotated[Any, neutral(0)] = None
    presence_penalty: Annotated[Any, neutral(0)] = None
    repetition_penalty: Annotated[Any, neutral(1)] = None
    length_penalty: Annotated[Any, neutral(1)] = None
    logit_bias: Annotated[Any, neutral({})] = None
    min_tokens: Annotated[Any, neutral(0)] = None
    stop_token_ids: Annotated[Any, neutral([])] = None
    bad_words: Annotated[Any, neutral([])] = None
    allowed_token_ids: Annotated[Any, neutral()] = None
    best_of: Annotated[Any, neutral(1)] = None
    use_beam_search: Annotated[Any, neutral(False)] = None
    echo: Annotated[Any, neutral(False)] = None
    prompt_logprobs: Annotated[Any, neutral()] = None
    include_stop_str_in_output: Annotated[Any, neutral(False)] = None
    skip_special_tokens: Annotated[Any, neutral(True)] = None
    spaces_between_special_tokens: Annotated[Any, neutral(True)] = None
    return_token_ids: Annotated[Any, neutral(False)] = None
    truncate_prompt_tokens: Annotated[Any, neutral()] = None
    response_format: Annotated[Any, neutral({"type": "text"})] = None
    priority: Annotated[Any, neutral(0)] = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise about("stream_options", "is only allowed when stream is true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The most tokens to generate, and the field that says so."""
        return "max_tokens", self.max_tokens


def about(field: str, message: str) -> PydanticCustomError:
    """Return an error of the whole body that is about one field of it."""
    return PydanticCustomError("invalid_value", "{message}", {"message": message, "field": field})


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    prompt: Prompt = Field(description="A text, several texts, token ids, or several lists of token ids.")
    logprobs: Annotated[Any, neutral()] = None
    suffix: Annotated[Any, neutral("")] = None
    add_special_tokens: Annotated[Any, neutral(True)] = None


def _developer_is_system(role: object) -> object:
    return "system" if role == "developer" else role


class ChatMessage(RequestModel):
    """One message of a conversation."""

    role: Annotated[
        Literal["system", "user", "assistant"],
        BeforeValidator(_developer_is_system, json_schema_input_type=WrittenRole),
    ] = Field(description="`developer` is another word for `system`.")
    content: Content = Field(description="Text, or text parts, which become its lines.")
    name: Text | None = Field(None, description="Who speaks; given to the chat template.")
    # Fields of a response's message, which comes back as a part of the next conversation.
    refusal: Annotated[Any, neutral()] = None
    audio: Annotated[Any, neutral()] = None
    annotations: Annotated[Any, neutral([])] = None
    function_call: Annotated[Any, neutral()] = None
    tool_calls: Annotated[Any, neutral([])] = None

    def for_template(self) -> dict[str, str]:
        """Return what chat templates expect of a message."""
        message = {"role": self.role, "content": self.content}
        return message if self.name is None else {**message, "name": self.name}


class ChatCompletionRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, description="The conversation so far.")
    max_completion_tokens: Count | None = Field(None, description="The newer name of `max_tokens`.")
    safety_identifier: Text | None = Field(None, description="Accepted; it has no effect on the result.")
    prompt_cache_key: Text | None = Field(None, description="Accepted; it has no effect on the result.")
    prompt_cache_options: Annotated[Any, neutral()] = None
    prompt_cache_retention: Annotated[Any, neutral()] = None
    service_tier: Annotated[Any, neutral("auto", "default")] = None
    store: Annotated[Any, neutral(False)] = None
    logprobs: Annotated[Any, neutral(False)] = None
    top_logprobs: Annotated[Any, neutral(0)] = None
    tools: Annotated[Any, neutral([])] = None
    tool_choice: Annotated[Any, neutral("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, neutral(True, False)] = None
    functions: Annotated[Any, neutral([])] = None
    function_call: Annotated[Any, neutral("none", "auto")] = None
    audio: Annotated[Any, neutral()] = None
    modalities: Annotated[Any, neutral(["text"])] = None
    moderation: Annotated[Any, neutral()] = None
    prediction: Annotated[Any, neutral()] = None
    reasoning_effort: Annotated[Any, neutral("none")] = None
    verbosity: Annotated[Any, neutral("medium")] = None
    web_search_options: Annotated[Any, neutral()] = None
    add_generation_prompt: Annotated[Any, neutral(True)] = None
    continue_final_message: Annotated[Any, neutral(False)] = None
    add_special_tokens: Annotated[Any, neutral(False)] = None
    chat_template: Annotated[Any, neutral()] = None
    chat_template_kwargs: Annotated[Any, neutral({})] = None
    documents: Annotated[Any, neutral([])] = None

    @model_validator(mode="after")
    def _check_limits(self) -> "ChatCompletionRequest":
        limits = self.max_tokens, self.max_completion_tokens
        if None not in limits and limits[0] != limits[1]:
            raise about("max_completion_tokens", "and max_tokens are two names of one limit, and they differ")
        return self

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The most tokens to generate, and the field that says so."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().token_limit
