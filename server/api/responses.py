"""What the API answers when it does not stream, in OpenAI's shapes."""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from server.api.logprobs import ChatLogprobs, CompletionLogprobs, PromptLogprob
from server.choice import Reason

StopReason = Annotated[str | int | None, Field(description="The stop string or the token of the request's, if any.")]
PromptLogprobs = list[dict[int, PromptLogprob] | None]

T = TypeVar("T")
IfThere = Annotated[T | None, Field(exclude_if=lambda value: value is None)]


class ErrorDetail(BaseModel):
    """What went wrong, and with which field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class PromptTokensDetails(TypedDict):
    """What became of the prompt's tokens."""

    cached_tokens: int  # did not have to be computed


class UsageCounts(TypedDict):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionChoice(BaseModel):
    """One continuation of a prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Reason
    stop_reason: StopReason = None
    token_ids: IfThere[list[int]] = None
    prompt_token_ids: IfThere[list[int]] = None
    prompt_logprobs: IfThere[PromptLogprobs] = None


class CompletionResponse(BaseModel):
    """Answer of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageCounts


class AssistantMessage(BaseModel):
    """The model's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer to a conversation."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason
    stop_reason: StopReason = None
    token_ids: IfThere[list[int]] = None


class ChatCompletionResponse(BaseModel):
    """Answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageCounts
    prompt_token_ids: IfThere[list[int]] = None
    prompt_logprobs: IfThere[PromptLogprobs] = None


class ModelCard(BaseModel):
    """One model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ryzanstein"
    max_model_len: int | None


class ModelList(BaseModel):
    """Answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class RankPlace(BaseModel):
    """Where one rank runs."""

    rank: int
    pid: int
    host: str
    device: str


class LastRecovery(BaseModel):
    """How the last group of ranks was lost that was, and how long each phase took to have the next."""

    cause: str
    kind: Literal["died", "hung", "failed", "orchestrator", "link"]
    noticed_at: Annotated[float, Field(description="Seconds since 1970, UTC.")]
    seconds: Annotated[dict[str, float], Field(description="By phase: kill, respawn, load; as far as is known yet.")]


class Readiness(BaseModel):
    """Answer of `GET /ready`; the bytes are those of all ranks' weights, shown while they are being loaded."""

    state: Literal["STARTING", "READY", "RECOVERING", "DRAINING", "FAILED"]
    epoch: int
    ranks: list[RankPlace]
    error: str | None = None
    loaded_bytes: IfThere[int] = None
    total_bytes: IfThere[int] = None
    last_recovery: IfThere[LastRecovery] = None


class Health(BaseModel):
    """Answer of `GET /health`."""

    status: Literal["ok"] = "ok"


class Version(BaseModel):
    """Answer of `GET /version`."""

    version: str
