"""What `tokenizer.json` says of how text is taken apart and put together again, besides the vocabulary."""

from typing import Any

import msgspec


class AddedToken(msgspec.Struct):
    """A token that is found in a text before anything else happens to it."""

    id: int
    content: str
    special: bool = False
    lstrip: bool = False  # takes the spaces before it along
    rstrip: bool = False


class Model(msgspec.Struct):
    """How pieces become tokens."""

    type: str | None = None
    byte_fallback: bool = False  # characters that the vocabulary lacks become tokens of their bytes


class TokenizerFile(msgspec.Struct):
    """The file's parts."""

    model: Model
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None
    added_tokens: list[AddedToken] = []

    def normalizers(self) -> list[dict[str, Any]]:
        """Return the steps before a text is cut."""
        return _steps(self.normalizer, "normalizers")

    def pre_tokenizers(self) -> list[dict[str, Any]]:
        """Return the steps that cut a text."""
        return _steps(self.pre_tokenizer, "pretokenizers")


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part[name] for step in _steps(inner, name)]
    return [part]
