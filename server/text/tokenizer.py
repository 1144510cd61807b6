"""Text → token ids, with the library that reads `tokenizer.json`, and the way back."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import tokenizers

from server.text.detokenizer import Detokenizer
from server.text.token_bound import TokenBound
from server.text.token_bytes import TokenBytes
from server.text.tokenizer_file import TokenizerFile


class Tokenizer:
    """The model's tokenizer.

    `token_bytes` is what each token spells, special tokens being silent; in `token_bytes_with_special` they are
    written out. `least_tokens` tells a number of tokens that a text certainly has, without tokenizing it.

    Raises:
        ValueError: naming the file, when it is no tokenizer that can be used.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        try:
            raw = path.read_bytes()
            parts = msgspec.json.decode(raw, type=TokenizerFile)
            self._tokenizer = tokenizers.Tokenizer.from_buffer(raw)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path}: cannot be read: {error}") from error
        self.least_tokens = TokenBound(parts, self._tokenizer.get_vocab(with_added_tokens=False))
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

    @property
    def largest_id(self) -> int:
        """The largest id of any token."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def id_of(self, token: str) -> int | None:
        """Return a token's id."""
        return self._tokenizer.token_to_id(token)
