"""What `POST /v1/completions` and `/v1/chat/completions` take.

A field works, or only its neutral values are accepted: nothing with an effect is taken and ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.fields import (
    Content,
    LogitBias,
    Prompt,
    RequestModel,
    Stop,
    Text,
    TokenIds,
    Variables,
    at_most,
    neutral,
)
from server.limits import (
    INT64,
    MAX_ITEMS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MAX_TIMEOUT,
    MIN_REPETITION_PENALTY,
    MIN_TIMEOUT,
)

Count = Annotated[int, Field(ge=0, le=INT64 - 1)]
AtLeastOne = Annotated[int, Field(ge=1, le=INT64 - 1)]
Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY, allow_inf_nan=False)]
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
    max_tokens: Count | None = Field(
        None, description="Most tokens to generate for each choice; 0, with `echo` or `prompt_logprobs`, only scores."
    )
    min_tokens: Count | None = Field(None, description="Tokens before which nothing but `max_tokens` ends the text.")
    temperature: float | None = Field(
        None, ge=0, le=MAX_TEMPERATURE, allow_inf_nan=False, description="0 takes the likeliest token each time."
    )
    top_p: Share | None = Field(None, description="Take only the likeliest tokens that make up this probability.")
    top_k: int | None = Field(None, ge=-1, le=INT64 - 1, description="Take only the k likeliest tokens; 0, -1: all.")
    min_p: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="Least probability, as a share of the likeliest token's."
    )
    seed: int | None = Field(None, ge=-INT64, le=INT64 - 1, description="Same seed and request, same text.")
    n: AtLeastOne | None = Field(None, description="Choices for each prompt.")
    presence_penalty: Penalty | None = Field(None, description="Taken from the logit of each token generated so far.")
    frequency_penalty: Penalty | None = Field(None, description="The same, as often as it was generated.")
    repetition_penalty: float | None = Field(
        None,
        ge=MIN_REPETITION_PENALTY,
        le=MAX_REPETITION_PENALTY,
        allow_inf_nan=False,
        description="Divides the logit of each token of prompt and text where it is positive, else multiplies it.",
    )
    logit_bias: LogitBias = Field({}, description="Added to tokens' logits, by token id; from -100 to 100.")
    stop: Stop = Field([], description="A string or strings; the text ends before the first that appears.")
    stop_token_ids: TokenIds = Field([], description="Tokens that end the text, besides the model's own.")
    include_stop_str_in_output: bool | None = Field(None, description="Let the text end in what ended it.")
    ignore_eos: bool | None = Field(None, description="Go on after the end-of-text token.")
    skip_special_tokens: bool | None = Field(None, description="False writes special tokens into the text.")
    prompt_logprobs: Count | None = Field(
        None, description="Give the log-probabilities of the prompt's tokens, with so many of the likeliest."
    )
    return_token_ids: bool | None = Field(None, description="Give the ids of the prompt's and the text's tokens.")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, le=INT64 - 1, description="Keep only the prompt's last tokens, so many; -1: as many as fit."
    )
    add_special_tokens: bool | None = Field(
        None, description="Frame the prompt as the tokenizer does; by default not where the chat template does it."
    )
    stream: bool | None = Field(None, description="Send the text as server-sent events while it is generated.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    timeout: float | None = Field(
        None,
        ge=MIN_TIMEOUT,
        le=MAX_TIMEOUT,
        allow_inf_nan=False,
        description="Seconds from the request's arrival in which to finish; after that it ends with an error.",
    )
    user: Text | None = Field(None, description="Accepted; it has no effect on the result.")
    metadata: FreeForm = None

    length_penalty: Annotated[Any, neutral(1)] = None
    bad_words: Annotated[Any, neutral([])] = None
    allowed_token_ids: Annotated[Any, neutral()] = None
    use_beam_search: Annotated[Any, neutral(False)] = None
    spaces_between_special_tokens: Annotated[Any, neutral(True)] = None
    response_format: Annotated[Any, neutral({"type": "text"})] = None
    priority: Annotated[Any, neutral(0)] = None
    structured_outputs: Annotated[Any, neutral()] = None
    guided_json: Annotated[Any, neutral()] = None
    guided_regex: Annotated[Any, neutral()] = None
    guided_choice: Annotated[Any, neutral()] = None
    guided_grammar: Annotated[Any, neutral()] = None
    return_tokens_as_token_ids: Annotated[Any, neutral(False)] = None
    cache_salt: Annotated[Any, neutral()] = None
    vllm_xargs: Annotated[Any, neutral()] = None
    kv_transfer_params: Annotated[Any, neutral()] = None

    @model_validator(mode="after")
    def _check_streaming(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise about("stream_options", "is only allowed when stream is true")
        if self.stream and self.prompt_logprobs is not None:
            raise about("prompt_logprobs", "are given in whole answers only, not in streams")
        return self

    @model_validator(mode="after")
    def _check_scoring(self) -> "GenerationRequest":
        name, limit = self.token_limit
        if limit == 0 and not self.has_echo and self.prompt_logprobs is None:
            raise about(name, "may only be 0 where echo or prompt_logprobs ask for something about the prompt")
        return self

    @model_validator(mode="after")
    def _check_truncation(self) -> "GenerationRequest":
        if self.truncate_prompt_tokens == 0:
            raise about("truncate_prompt_tokens", "must be -1, or at least 1")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The most tokens to generate, and the field that says so."""
        return "max_tokens", self.max_tokens

    @property
    def num_choices(self) -> int:
        """Choices for each prompt."""
        return self.n or 1

    @property
    def num_sampled(self) -> int:
        """Sequences of which the choices are the likeliest."""
        return self.num_choices

    @property
    def num_logprobs(self) -> int | None:
        """The likeliest tokens to give at each position of the text, None where no log-probabilities are wanted."""
        return None

    @property
    def has_echo(self) -> bool:
        """Whether the text begins with the prompt's."""
        return False


def about(field: str, message: str) -> PydanticCustomError:
    """Return an error of the whole body that is about one field of it."""
    return PydanticCustomError("invalid_value", "{message}", {"message": message, "field": field})


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    prompt: Prompt = Field(description="A text, several texts, token ids, or several lists of token ids.")
    logprobs: Count | None = Field(
        None, description="Give the log-probabilities of the text's tokens, with so many of the likeliest."
    )
    echo: bool | None = Field(None, description="Begin the text with the prompt's.")
    best_of: AtLeastOne | None = Field(
        None, description="Generate so many choices and return the `n` whose tokens are the likeliest on average."
    )
    suffix: Annotated[Any, neutral("")] = None

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        if self.num_sampled < self.num_choices:
            raise about("best_of", f"must be at least n, which is {self.num_choices}")
        if self.stream and self.num_sampled > self.num_choices:
            raise about("best_of", "must be n in a stream: which are the best is known at the end")
        return self

    @property
    def num_sampled(self) -> int:
        """Sequences of which the choices are the likeliest."""
        return self.best_of or self.num_choices

    @property
    def num_logprobs(self) -> int | None:
        """The likeliest tokens to give at each position of the text, None where no log-probabilities are wanted."""
        return self.logprobs

    @property
    def has_echo(self) -> bool:
        """Whether the text begins with the prompt's."""
        return bool(self.echo)


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


Messages = Annotated[list[ChatMessage], Field(fail_fast=True), at_most(MAX_ITEMS)]


class ChatCompletionRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: Messages = Field(min_length=1, description="The conversation so far.")
    max_completion_tokens: Count | None = Field(None, description="The newer name of `max_tokens`.")
    safety_identifier: Text | None = Field(None, description="Accepted; it has no effect on the result.")
    prompt_cache_key: Text | None = Field(None, description="Accepted; it has no effect on the result.")
    prompt_cache_options: Annotated[Any, neutral()] = None
    prompt_cache_retention: Annotated[Any, neutral()] = None
    service_tier: Annotated[Any, neutral("auto", "default")] = None
    store: Annotated[Any, neutral(False)] = None
    logprobs: bool | None = Field(None, description="Give the log-probabilities of the message's tokens.")
    top_logprobs: Count | None = Field(None, description="With `logprobs`: so many of the likeliest at each position.")
    add_generation_prompt: bool | None = Field(None, description="False leaves the assistant's message unopened.")
    continue_final_message: bool | None = Field(
        None, description="Go on with the last message; needs `add_generation_prompt` to be false."
    )
    chat_template_kwargs: Variables = Field({}, description="More variables for the chat template.")
    echo: Annotated[Any, neutral(False)] = None
    best_of: Annotated[Any, neutral(1)] = None
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
    chat_template: Annotated[Any, neutral()] = None
    documents: Annotated[Any, neutral([])] = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise about("top_logprobs", "is only allowed when logprobs is true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """The likeliest tokens to give at each position of the text, None where no log-probabilities are wanted."""
        return self.top_logprobs or 0 if self.logprobs else None

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
