"""Stop strings, found in text that arrives in pieces.

Each stop string is matched by the algorithm of Knuth, Morris and Pratt (1977), which knows after every character how
much of the stop string the text ends in: that much, and no more, must be held back.
"""

from collections.abc import Sequence


class _Pattern:
    """One stop string, and how many of its characters the text so far ends in."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._borders = _borders(text)

    def feed(self, character: str) -> bool:
        """Take one character; return True when the stop string is complete."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self._borders[self.matched - 1]
        if self.text[self.matched] == character:
            self.matched += 1
        return self.matched == len(self.text)


def _borders(text: str) -> list[int]:
    """Return, for each prefix of `text`, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = borders[length - 1]
        if text[index] == text[length]:
            length += 1
        borders[index] = length
    return borders


class StopStrings:
    """Passes text on until a stop string is complete; the stop string itself, or a part of it, never gets through.

    Of several stop strings the one that is complete first counts, of those complete at once the longest. `found` is
    the one that was found. With `include_in_output` it is passed on whole, as the text's end.
    """

    def __init__(self, stop: Sequence[str], *, include_in_output: bool = False) -> None:
        self._patterns = [_Pattern(text) for text in stop]
        self._include_in_output = include_in_output
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """Return the text that can be passed on now that `text` has come."""
        if self.found is not None:
            return ""
        if not self._patterns:
            return text
        for index, character in enumerate(text):
            complete = [pattern.text for pattern in self._patterns if pattern.feed(character)]
            if complete:
                self.found = max(complete, key=len)
                return self._release(text[: index + 1], 0 if self._include_in_output else len(self.found))
        return self._release(text, max(pattern.matched for pattern in self._patterns))

    def finish(self) -> str:
        """Return what was held back; no more text comes."""
        return "" if self.found is not None else self._release("", 0)

    def _release(self, text: str, hold: int) -> str:
        available = self._held + text
        released = available[: len(available) - hold]
        self._held = available[len(released) :]
        return released
