"""A stream's chunks. They are made for every token, so msgspec encodes them; the shapes are OpenAI's."""

import time
from typing import Protocol

import msgspec
from msgspec import UNSET, Struct, UnsetType

from server.generation import Delta


class _CompletionChoice(Struct):
    index: int
    text: str
    logprobs: None = None
    finish_reason: str | None = None


class _ChatDelta(Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class _ChatChoice(Struct):
    index: int
    delta: _ChatDelta
    logprobs: None = None
    finish_reason: str | None = None


class _Chunk(Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[_CompletionChoice] | list[_ChatChoice]
    usage: dict[str, int] | UnsetType | None = UNSET


class ChunkEncoder(Protocol):
    """Turns deltas into the events of one API's stream."""

    def encode(self, delta: Delta) -> bytes:
        """Return the events that `delta` makes, possibly none."""

    def encode_usage(self, usage: dict[str, int]) -> bytes:
        """Return the event with the token counts."""


class _Events:
    """What all chunks of one stream share. With `include_usage` each has a `usage`, which is null but in the last."""

    def __init__(self, response_id: str, kind: str, model: str, include_usage: bool) -> None:
        self._head = response_id, kind, int(time.time()), model
        self._usage: UnsetType | None = None if include_usage else UNSET
        self._encode = msgspec.json.Encoder().encode

    def event(self, choices: list[_CompletionChoice] | list[_ChatChoice]) -> bytes:
        return b"data: " + self._encode(_Chunk(*self._head, choices, self._usage)) + b"\n\n"

    def encode_usage(self, usage: dict[str, int]) -> bytes:
        """Return the event with the token counts."""
        no_choices: list[_CompletionChoice] = []
        return b"data: " + self._encode(_Chunk(*self._head, no_choices, usage)) + b"\n\n"


class CompletionChunks(_Events):
    """The stream of `/v1/completions`."""

    def __init__(self, response_id: str, model: str, include_usage: bool) -> None:
        super().__init__(response_id, "text_completion", model, include_usage)

    def encode(self, delta: Delta) -> bytes:
        """Return the event that `delta` makes, if any."""
        if not delta.text and delta.finish_reason is None:
            return b""
        return self.event([_CompletionChoice(delta.index, delta.text, finish_reason=delta.finish_reason)])


class ChatChunks(_Events):
    """The stream of `/v1/chat/completions`: a choice begins with its role and ends with its finish reason."""

    def __init__(self, response_id: str, model: str, include_usage: bool) -> None:
        super().__init__(response_id, "chat.completion.chunk", model, include_usage)
        self._begun: set[int] = set()

    def encode(self, delta: Delta) -> bytes:
        """Return the events that `delta` makes, possibly none."""
        events = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            events.append(self.event([_ChatChoice(delta.index, _ChatDelta("assistant", ""))]))
        if delta.text:
            events.append(self.event([_ChatChoice(delta.index, _ChatDelta(content=delta.text))]))
        if delta.finish_reason is not None:
            events.append(self.event([_ChatChoice(delta.index, _ChatDelta(), finish_reason=delta.finish_reason)]))
        return b"".join(events)
