"""Text → token ids, with the library that reads `tokenizer.json`, and the way back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from server.detokenizer import Detokenizer
from server.token_bytes import TokenBytes, byte_level_alphabet


class _AddedToken(msgspec.Struct):
    id: int
    special: bool = False
    lstrip: bool = False  # takes the spaces before it along
    rstrip: bool = False


class _TokenizerFile(msgspec.Struct):
    """What `tokenizer.json` says of how text is taken apart and put together again."""

    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None
    added_tokens: list[_AddedToken] = []

    def keeps_every_byte(self) -> bool:
        """Return whether the tokens of any text certainly spell at least all of its bytes."""
        if self.normalizer is not None or any(token.lstrip or token.rstrip for token in self.added_tokens):
            return False
        steps = (self.pre_tokenizer or {}).get("pretokenizers", [self.pre_tokenizer or {}])
        kinds = [step.get("type") for step in steps if step.get("behavior") != "Removed"]
        return "ByteLevel" in kinds and len(kinds) == len(steps) and {"ByteLevel", "Split", "Digits"}.issuperset(kinds)


class Tokenizer:
    """The model's tokenizer.

    `token_bytes` is what each token spells, special tokens being silent; in `token_bytes_with_special` they are
    written out.

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
        self._longest = _longest_token(self._tokenizer) if parts.keeps_every_byte() else None
        # Left-overs of training: a prompt must be neither cut nor filled up.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        special = frozenset(token.id for token in parts.added_tokens if token.special)
        try:
            self.token_bytes = TokenBytes(self._tokenizer, parts.decoder, silent_ids=special)
            self.token_bytes_with_special = TokenBytes(self._tokenizer, parts.decoder)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of `text`, with the tokenizer's own frame (begin of text) if asked for."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Return each text's ids as `encode` does, but let Python's other threads go on meanwhile.

        The library does this in threads of its own, so that even a short text waits until one of them is free.
        """
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text that `token_ids` spell, special tokens written out."""
        detokenizer = Detokenizer(self.token_bytes_with_special, ())
        return detokenizer.feed(token_ids) + detokenizer.finish()

    def token_strs(self, token_ids: Sequence[int]) -> list[str]:
        """Return each token as the vocabulary spells it; "" where an id has no token."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids]

    def least_tokens(self, text: str) -> int:
        """Return a number of tokens that `text` certainly has, found without tokenizing it."""
        return 0 if self._longest is None else -(-len(text.encode()) // self._longest)

    @property
    def largest_id(self) -> int:
        """The largest id of any token."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def id_of(self, token: str) -> int | None:
        """Return a token's id."""
        return self._tokenizer.token_to_id(token)


def _longest_token(tokenizer: tokenizers.Tokenizer) -> int | None:
    """Return the bytes of the longest token of a byte-level vocabulary; None where it lacks a byte."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary.keys() >= byte_level_alphabet().keys():
        return None
    return max(len(token.encode()) for token in vocabulary)  # no less than what it spells
