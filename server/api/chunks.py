"""A stream's chunks. They are made for every token, so msgspec encodes them; the shapes are OpenAI's."""

import time
from typing import Protocol

import msgspec
from msgspec import UNSET, Struct, UnsetType

from server.api.logprobs import ChatLogprobs, CompletionLogprobs, LogprobFormat
from server.api.responses import UsageCounts
from server.choice import Delta


class _CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class _ChatDelta(Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class _ChatChoice(Struct):
    index: int
    delta: _ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class _Chunk(Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[_CompletionChoice] | list[_ChatChoice]
    usage: UsageCounts | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChunkEncoder(Protocol):
    """Turns deltas into the chunks of one API's stream: each is the data of an event, in JSON."""

    head: bytes  # what all chunks begin with

    def encode(self, delta: Delta) -> list[bytes]:
        """Return the chunks that `delta` makes, possibly none."""

    def encode_usage(self, usage: UsageCounts) -> bytes:
        """Return the chunk with the token counts."""


class _Chunks:
    """What all chunks of one stream share. With `include_usage` each has a `usage`, which is null but in the last."""

    def __init__(self, response_id: str, kind: str, model: str, logprobs: LogprobFormat, include_usage: bool) -> None:
        self._fields = response_id, kind, int(time.time()), model
        self._logprobs = logprobs
        self._usage: UnsetType | None = None if include_usage else UNSET
        self._encode = msgspec.json.Encoder().encode
        empty = self.chunk([])
        self.head = empty[: empty.rindex(b"[") + 1]  # `choices` is the last field that is there in all, and not null

    def chunk(
        self,
        choices: list[_CompletionChoice] | list[_ChatChoice],
        prompt_token_ids: list[int] | UnsetType = UNSET,
    ) -> bytes:
        return self._encode(_Chunk(*self._fields, choices, self._usage, prompt_token_ids))

    def encode_usage(self, usage: UsageCounts) -> bytes:
        """Return the chunk with the token counts."""
        no_choices: list[_CompletionChoice] = []
        return self._encode(_Chunk(*self._fields, no_choices, usage))


class CompletionChunks(_Chunks):
    """The stream of `/v1/completions`."""

    def __init__(self, response_id: str, model: str, logprobs: LogprobFormat, include_usage: bool) -> None:
        super().__init__(response_id, "text_completion", model, logprobs, include_usage)

    def encode(self, delta: Delta) -> list[bytes]:
        """Return the chunk that `delta` makes, if any."""
        if not _has_news(delta) and delta.finish_reason is None:
            return []
        choice = _CompletionChoice(delta.index, delta.text, finish_reason=delta.finish_reason)
        if delta.entries:
            choice.logprobs = self._logprobs.completion(delta.entries)
        if delta.finish_reason is not None:
            choice.stop_reason = delta.stop_reason
        if delta.token_ids is not None:
            choice.token_ids = delta.token_ids
        if delta.prompt_token_ids is not None:
            choice.prompt_token_ids = delta.prompt_token_ids
        return [self.chunk([choice])]


class ChatChunks(_Chunks):
    """The stream of `/v1/chat/completions`: a choice begins with its role and ends with its finish reason."""

    def __init__(self, response_id: str, model: str, logprobs: LogprobFormat, include_usage: bool) -> None:
        super().__init__(response_id, "chat.completion.chunk", model, logprobs, include_usage)
        self._begun: set[int] = set()

    def encode(self, delta: Delta) -> list[bytes]:
        """Return the chunks that `delta` makes, possibly none."""
        chunks = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            ids = UNSET if delta.prompt_token_ids is None else delta.prompt_token_ids
            chunks.append(self.chunk([_ChatChoice(delta.index, _ChatDelta("assistant", ""))], ids))
        if _has_news(delta):
            chunks.append(self.chunk([self._content(delta)]))
        if delta.finish_reason is not None:
            end = _ChatChoice(
                delta.index, _ChatDelta(), finish_reason=delta.finish_reason, stop_reason=delta.stop_reason
            )
            chunks.append(self.chunk([end]))
        return chunks

    def _content(self, delta: Delta) -> _ChatChoice:
        choice = _ChatChoice(delta.index, _ChatDelta(content=delta.text))
        if delta.entries:
            choice.logprobs = self._logprobs.chat(delta.entries)
        if delta.token_ids is not None:
            choice.token_ids = delta.token_ids
        return choice


def _has_news(delta: Delta) -> bool:
    return bool(delta.text or delta.entries or delta.token_ids)
