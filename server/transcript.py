"""A choice's text as its tokens come, and the log-probabilities that go with each piece of it."""

from collections import deque

import msgspec

from engine.protocol.messages import TokenLogprobs
from server.text.detokenizer import Detokenizer
from server.text.stop_strings import StopStrings


class LogprobEntry(msgspec.Struct, frozen=True):
    """One token of the text."""

    token_id: int
    logprobs: TokenLogprobs | None  # of a prompt's first token there are none
    text_offset: int  # characters that were complete before it


class Transcript:
    """The text of one choice up to its stop string, with an entry for each token if these are wanted.

    Entries run parallel to the text: a token's entry comes with the piece in which the last of its text comes, so that
    nothing of what is held back can be told from them. A token without text of its own, such as the first bytes of a
    character, goes with the token that completes it. Entries of tokens that lie wholly beyond the text's end are
    dropped. What comes, and when, depends on the tokens alone and not on how they were grouped.
    """

    def __init__(self, detokenizer: Detokenizer, stop: StopStrings, *, with_entries: bool) -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._entries = _Entries() if with_entries else None

    def add(self, token_id: int, logprobs: TokenLogprobs | None = None, *, searched: bool = True) -> str:
        """Return the text that can be passed on now that a token has come.

        Args:
            token_id: the token.
            logprobs: its log-probabilities, for its entry.
            searched: whether stop strings may begin in its text; false only before it was ever true.
        """
        text = self._detokenizer.feed((token_id,))
        released = self._stop.feed(text) if searched else text
        if self._entries is not None:
            self._entries.add(token_id, logprobs, len(text), is_open=self._detokenizer.is_inside_character)
            self._entries.release(len(released), is_end=self._stop.found is not None)
        return released

    def finish(self, *, searched: bool = True) -> str:
        """Return what was held back; no more tokens come."""
        text = self._detokenizer.finish()
        released = (self._stop.feed(text) if searched else text) + self._stop.finish()
        if self._entries is not None:
            self._entries.close(len(text))
            self._entries.release(len(released), is_end=self._stop.found is not None)
        return released

    def take_entries(self) -> list[LogprobEntry]:
        """Return the entries that go with the text since the last call."""
        return [] if self._entries is None else self._entries.take()


class _Entries:
    """Entries on their way, with the number of characters at which each may go out."""

    def __init__(self) -> None:
        self._inside_character: list[LogprobEntry] = []  # where their text ends is not known
        self._waiting: deque[tuple[int, LogprobEntry]] = deque()
        self._ready: list[LogprobEntry] = []
        self._num_characters = 0
        self._num_released = 0

    def add(self, token_id: int, logprobs: TokenLogprobs | None, num_characters: int, *, is_open: bool) -> None:
        self._inside_character.append(LogprobEntry(token_id, logprobs, self._num_characters))
        if is_open:
            self._num_characters += num_characters
        else:
            self.close(num_characters)

    def close(self, num_characters: int) -> None:
        self._num_characters += num_characters
        self._waiting.extend((self._num_characters, entry) for entry in self._inside_character)
        self._inside_character.clear()

    def release(self, num_characters: int, *, is_end: bool) -> None:
        self._num_released += num_characters
        while self._waiting and self._waiting[0][0] <= self._num_released:
            self._ready.append(self._waiting.popleft()[1])
        if is_end:
            self.close(0)
            self._ready.extend(entry for _, entry in self._waiting if entry.text_offset < self._num_released)
            self._waiting.clear()

    def take(self) -> list[LogprobEntry]:
        taken, self._ready = self._ready, []
        return taken
