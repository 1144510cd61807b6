"""Log-probabilities in the API's shapes, in whole answers and in streams."""

from collections.abc import Mapping, Sequence

from typing_extensions import TypedDict

from engine.protocol.messages import TokenLogprobs
from server.transcript import LogprobEntry

LEAST_LOGPROB = -9999.0  # for minus infinity, which JSON does not have


class CompletionLogprobs(TypedDict):
    """Of a completion's text: lists that run parallel, with one item a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(TypedDict):
    """One of the likeliest tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """One token of a message."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Of a message's tokens."""

    content: list[ChatTokenLogprob]
    refusal: None


class PromptLogprob(TypedDict):
    """One token at a position of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


class LogprobFormat:
    """Writes entries as the API shows them, with the `num_top` likeliest tokens at each position.

    Args:
        token_bytes: what each token spells, special tokens too.
        num_top: how many of the likeliest.
    """

    def __init__(self, token_bytes: Mapping[int, bytes], num_top: int) -> None:
        self._token_bytes = token_bytes
        self._num_top = num_top

    def completion(self, entries: Sequence[LogprobEntry]) -> CompletionLogprobs:
        """Return OpenAI's shape for completions."""
        logprobs = [entry.logprobs for entry in entries]
        return {
            "tokens": [self._token(entry.token_id) for entry in entries],
            "token_logprobs": [None if found is None else _finite(found.logprob) for found in logprobs],
            "top_logprobs": [None if found is None else self._top_by_text(found) for found in logprobs],
            "text_offset": [entry.text_offset for entry in entries],
        }

    def chat(self, entries: Sequence[LogprobEntry]) -> ChatLogprobs:
        """Return OpenAI's shape for chat."""
        return {"content": [self._chat_token(e.logprobs) for e in entries if e.logprobs is not None], "refusal": None}

    def prompt(self, tokens: Sequence[TokenLogprobs]) -> list[dict[int, PromptLogprob] | None]:
        """Return vLLM's shape for a prompt, whose first token has none."""
        return [None, *map(self._by_id, tokens)]

    def _by_id(self, token: TokenLogprobs) -> dict[int, PromptLogprob]:
        top = enumerate(self._top(token), start=1)
        return {
            token.token_id: self._ranked(token.token_id, token.logprob, token.rank),
            **{token_id: self._ranked(token_id, value, rank) for rank, (token_id, value) in top},
        }

    def _ranked(self, token_id: int, value: float, rank: int) -> PromptLogprob:
        return {"logprob": _finite(value), "rank": rank, "decoded_token": self._token(token_id)}

    def _top_by_text(self, token: TokenLogprobs) -> dict[str, float]:
        """Return the likeliest tokens and this one; of two that are written alike the likelier counts."""
        found: dict[str, float] = {}
        for token_id, value in (*self._top(token), (token.token_id, token.logprob)):
            found.setdefault(self._token(token_id), _finite(value))
        return found

    def _chat_token(self, token: TokenLogprobs) -> ChatTokenLogprob:
        return {
            **self._chat_top(token.token_id, token.logprob),
            "top_logprobs": [self._chat_top(token_id, value) for token_id, value in self._top(token)],
        }

    def _chat_top(self, token_id: int, value: float) -> TopLogprob:
        return {"token": self._token(token_id), "logprob": _finite(value), "bytes": list(self._token_bytes[token_id])}

    def _top(self, token: TokenLogprobs) -> list[tuple[int, float]]:
        return list(zip(token.top_token_ids, token.top_logprobs, strict=True))[: self._num_top]

    def _token(self, token_id: int) -> str:
        """Return a token's text; one that is no text by itself is written byte by byte, as OpenAI does."""
        spelled = self._token_bytes[token_id]
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
