"""One sequence on its way: token outputs in, pieces of text out."""

from dataclasses import dataclass
from itertools import repeat
from typing import Literal

import msgspec

from engine.protocol.messages import FinishReason, Request, TokenLogprobs, TokenOutput
from server.errors import engine_failed
from server.text.detokenizer import Detokenizer
from server.text.stop_strings import StopStrings
from server.text.token_bytes import TokenBytes
from server.transcript import LogprobEntry, Transcript

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class TextOptions:
    """What a request wants of its choices' text; the engine knows nothing of it."""

    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()  # the request's own
    include_stop: bool = False  # in the text
    min_tokens: int = 0  # in whose text no stop string is looked for
    echo: bool = False  # the text begins with the prompt's
    scores_only: bool = False  # no token is wanted; the engine, which makes at least one, makes it in vain
    logprobs: bool = False
    token_ids: bool = False


class Delta(msgspec.Struct):
    """What is new of one choice; its last one has a finish reason."""

    index: int
    text: str
    finish_reason: Reason | None = None
    stop_reason: str | int | None = None  # the stop string, or the token of the request's, that ended the text
    token_ids: list[int] | None = None
    entries: list[LogprobEntry] = []
    prompt_token_ids: list[int] | None = None  # with the first, where ids are wanted


class Choice:
    """One sequence's text.

    A stop token is not part of the text and has no entry, nor is a stop string, unless `include_stop`. `num_tokens`
    counts every token up to the one that ended the text.
    """

    def __init__(self, index: int, request: Request, options: TextOptions, token_bytes: TokenBytes) -> None:
        prompt = request.prompt_token_ids
        self.index = index
        self.prompt_token_ids = prompt
        self.prompt_logprobs: list[TokenLogprobs] = []  # of all the prompt's tokens but the first
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self._logprob_sum = 0.0
        self._options = options
        self._has_begun = False
        self._stop = StopStrings(options.stop, include_in_output=options.include_stop)
        detokenizer = Detokenizer(token_bytes, [] if options.echo else prompt)
        self._transcript = Transcript(detokenizer, self._stop, with_entries=options.logprobs)

    @property
    def mean_logprob(self) -> float:
        """How likely the sampled tokens were, each; known where the engine was asked for logprobs."""
        return self._logprob_sum / max(1, self.num_tokens)

    def feed(self, output: TokenOutput) -> Delta:
        """Return what `output` adds.

        Raises:
            APIError: when the engine ended the sequence with an error.
        """
        if output.finish_reason is FinishReason.ERROR:
            raise engine_failed(output.error or "The engine could not finish this request.")
        if self._has_begun:
            return self._continue(output)
        return self._begin(output)

    def _begin(self, output: TokenOutput) -> Delta:
        """Take what comes up to the first token."""
        self.prompt_logprobs.extend(output.prompt_logprobs)
        self.num_cached_tokens += output.num_cached_tokens or 0
        if not output.token_ids and output.finish_reason is None:
            return Delta(self.index, "")
        self._has_begun = True
        echo = self._echo() if self._options.echo else ""
        delta = self._continue(_without_tokens(output) if self._options.scores_only else output)
        delta.text = echo + delta.text
        if self._options.token_ids:
            delta.prompt_token_ids = self.prompt_token_ids
        return delta

    def _continue(self, output: TokenOutput) -> Delta:
        options, num_before = self._options, self.num_tokens
        text = self._add_tokens(output)
        is_cut = self._stop.found is not None
        if output.finish_reason is not None and not is_cut:
            text += self._transcript.finish(searched=self.num_tokens > options.min_tokens)
        delta = Delta(self.index, text)
        if options.token_ids:
            delta.token_ids = output.token_ids[: self.num_tokens - num_before]
        if options.logprobs:
            delta.entries = self._transcript.take_entries()
        if is_cut or output.finish_reason is not None:
            delta.finish_reason, delta.stop_reason = self._reasons(output)
        return delta

    def _echo(self) -> str:
        logprobs: list[TokenLogprobs | None] = [None, *self.prompt_logprobs]
        pairs = zip(self.prompt_token_ids, logprobs if self._options.logprobs else repeat(None), strict=False)
        return "".join(self._transcript.add(token_id, found, searched=False) for token_id, found in pairs)

    def _add_tokens(self, output: TokenOutput) -> str:
        """Return the text of the tokens, as far as a stop string leaves them."""
        token_ids, logprobs, min_tokens = output.token_ids, output.logprobs, self._options.min_tokens
        is_hidden = output.finish_reason is FinishReason.STOP and not self._options.include_stop
        num_shown = len(token_ids) - is_hidden
        text = ""
        for position, token_id in enumerate(token_ids):
            self.num_tokens += 1
            found = logprobs[position] if logprobs else None
            if found is not None:
                self._logprob_sum += found.logprob
            if position < num_shown:
                text += self._transcript.add(token_id, found, searched=self.num_tokens > min_tokens)
            if self._stop.found is not None:
                break
        return text

    def _reasons(self, output: TokenOutput) -> tuple[Reason, str | int | None]:
        """Return the finish reason and the stop reason at the end, which came with `output`."""
        if self._stop.found is not None:
            return "stop", self._stop.found
        if output.finish_reason is not FinishReason.STOP:
            return "length", None
        last = output.token_ids[-1]
        return "stop", last if last in self._options.stop_token_ids else None


def _without_tokens(output: TokenOutput) -> TokenOutput:
    reason = None if output.finish_reason is None else FinishReason.LENGTH
    return TokenOutput(output.request_id, [], reason)
