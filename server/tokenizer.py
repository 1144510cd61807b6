"""Text → token ids, with the library that reads `tokenizer.json`, and the way back for `server.detokenizer`."""

from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from server.token_bytes import TokenBytes


class _AddedToken(msgspec.Struct):
    id: int
    special: bool = False


class _TokenizerFile(msgspec.Struct):
    """The two sections of `tokenizer.json` that say how text is put together again."""

    decoder: dict[str, Any] | None = None
    added_tokens: list[_AddedToken] = []


class Tokenizer:
    """The model's tokenizer.

    Raises:
        ValueError: naming the file, when it is no tokenizer that can be used.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        try:
            raw = path.read_bytes()
            parts = msgspec.json.decode(raw, type=_TokenizerFile)
            self._tokenizer = tokenizers.Tokenizer.from_buffer(raw)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path}: cannot be read: {error}") from error
        # Left-overs of training: a prompt must be neither cut nor filled up.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        special = frozenset(token.id for token in parts.added_tokens if token.special)
        try:
            self.token_bytes = TokenBytes(self._tokenizer, parts.decoder, special)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of `text`, with the tokenizer's own frame (begin of text) if asked for."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def id_of(self, token: str) -> int | None:
        """Return a token's id."""
        return self._tokenizer.token_to_id(token)
