"""Token id → the bytes it stands for.

A text is the bytes of its tokens, one after the other: both tokenizer families of Llama-like models have that in
common, and what lets text be produced token by token without ever decoding anything twice. The `decoder` section of
`tokenizer.json` says how a token's spelling becomes bytes.
"""

import re
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_Spelling = Callable[[str], str | bytes]


def byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's table: the character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


class TokenBytes(dict[int, bytes]):
    """The bytes of each token, looked up once. `silent_ids` and ids without a token stand for nothing.

    `leading_spaces` is how many spaces the tokenizer puts before a text and takes away again: they do not belong to a
    completion that starts the text.

    Raises:
        ValueError: on a decoder that is neither byte-level nor of SentencePiece's kind.
    """

    def __init__(
        self, tokenizer: Tokenizer, decoder: dict[str, Any] | None, silent_ids: frozenset[int] = frozenset()
    ) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._silent_ids = silent_ids
        steps = _flatten(decoder)
        self.leading_spaces = sum(_leading_spaces(step) for step in steps)
        self._spellings = [spelling for step in steps for spelling in _spelling(step)]

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._silent_ids else self._tokenizer.id_to_token(token_id)
        self[token_id] = found = b"" if token is None else self._spell(token)
        return found

    def _spell(self, token: str) -> bytes:
        piece: str | bytes = token
        for spelling in self._spellings:
            if isinstance(piece, bytes):
                return piece
            piece = spelling(piece)
        return piece if isinstance(piece, bytes) else piece.encode("utf-8", "replace")


def _flatten(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        raise ValueError("decoder is missing; only byte-level and SentencePiece tokenizers are read")
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _flatten(inner)]
    return [decoder]


def _leading_spaces(step: dict[str, Any]) -> int:
    if step["type"] == "Strip":
        if step["content"] != " " or step["stop"]:
            raise ValueError(f"decoder Strip of {step['content']!r} is not read; only of spaces at the text's start")
        return int(step["start"])
    return int(step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")


def _spelling(step: dict[str, Any]) -> list[_Spelling]:
    """Return what a step does to one token; steps that act on the whole text do nothing here."""
    kind = step["type"]
    if kind == "ByteLevel":
        return [_byte_level(byte_level_alphabet())]
    if kind == "Replace" and "String" in step["pattern"]:
        return [_replace(step["pattern"]["String"], step["content"])]
    if kind == "Metaspace":
        return [_replace(step["replacement"], " ")]
    if kind == "ByteFallback":
        return [_byte_fallback]
    if kind in ("Fuse", "Strip"):
        return []
    raise ValueError(f"decoder {kind} is not read; only byte-level and SentencePiece tokenizers are")


def _byte_level(alphabet: dict[str, int]) -> _Spelling:
    def spell(token: str) -> bytes:
        try:
            return bytes(alphabet[character] for character in token)
        except KeyError:  # an added token, written as it is
            return token.encode("utf-8", "replace")

    return spell


def _replace(old: str, new: str) -> _Spelling:
    return lambda token: token.replace(old, new)


def _byte_fallback(token: str) -> str | bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes((int(match[1], 16),)) if match else token
