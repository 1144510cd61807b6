"""How few tokens a text can have, told without tokenizing it, so that a prompt that cannot fit costs nothing.

What a tokenizer certainly keeps of any text, divided by the most that one token can spell of it:

- byte-level, no normalizer: every byte.
- byte-level after NFC: every ASCII character. Composition makes one character of several, but of no two that are ASCII:
  these compose with nothing before them.
- SentencePiece with tokens for all bytes: every character. A space becomes ▁, and nothing is unknown.
"""

from collections.abc import Callable, Mapping
from typing import Any

from server.text.token_bytes import byte_level_alphabet
from server.text.tokenizer_file import TokenizerFile

_Measure = Callable[[str], int]

_CUTTERS = {"ByteLevel", "Split", "Digits", "Metaspace"}
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_SPACE_TO_METASPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


class TokenBound:
    """A lower bound of the number of a text's tokens; 0 where nothing is known of the tokenizer.

    Args:
        file: the tokenizer's parts.
        vocabulary: the pieces of its model, added tokens apart.
    """

    def __init__(self, file: TokenizerFile, vocabulary: Mapping[str, int]) -> None:
        self._kept = _kept(file, vocabulary)
        # A piece has a character for each byte or character that it spells.
        lengths = [*map(len, vocabulary), *(len(token.content.encode()) for token in file.added_tokens)]
        self._longest = max(lengths, default=1)

    def __call__(self, text: str) -> int:
        """Return a number of tokens that `text` certainly has."""
        return 0 if self._kept is None else -(-self._kept(text) // self._longest)


def _kept(file: TokenizerFile, vocabulary: Mapping[str, int]) -> _Measure | None:
    """Return what counts what is certainly kept of a text."""
    if file.model.type != "BPE" or any(token.lstrip or token.rstrip for token in file.added_tokens):
        return None
    cutters = file.pre_tokenizers()
    if not all(step["type"] in _CUTTERS and step.get("behavior") != "Removed" for step in cutters):
        return None
    changes = [step["type"] for step in file.normalizers() if not _keeps_characters(step)]
    if any(step["type"] == "ByteLevel" for step in cutters):
        return _kept_by_byte_level(changes) if vocabulary.keys() >= byte_level_alphabet().keys() else None
    knows_all = file.model.byte_fallback and vocabulary.keys() >= _BYTE_TOKENS
    return len if knows_all and not changes else None


def _kept_by_byte_level(changes: list[str]) -> _Measure | None:
    if not changes:
        return _num_bytes
    return _num_ascii if changes == ["NFC"] else None


def _keeps_characters(normalizer: dict[str, Any]) -> bool:
    return normalizer["type"] == "Prepend" or normalizer == _SPACE_TO_METASPACE


def _num_bytes(text: str) -> int:
    return len(text.encode())


def _num_ascii(text: str) -> int:
    return len(text.encode("ascii", "ignore"))
