"""Token ids in, text out, as the tokens arrive: the work for a token does not depend on how many came before."""

import codecs
from collections.abc import Sequence

from server.text.token_bytes import TokenBytes

LONGEST_CHARACTER = 4  # bytes in UTF-8


class Detokenizer:
    """The text of one completion.

    Bytes of a character that is not complete yet are held back. Bytes that are no UTF-8 become U+FFFD, one for each
    maximal subpart (Unicode 17.0, section 3.9).
    """

    def __init__(self, token_bytes: TokenBytes, prompt_token_ids: Sequence[int]) -> None:
        self._bytes_of = token_bytes.__getitem__
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decode = self._decoder.decode
        # A prompt given as ids may end inside a character: the completion then begins with the rest of it.
        self._decode(b"".join(map(self._bytes_of, prompt_token_ids[1 - LONGEST_CHARACTER :])))
        continues = any(self._bytes_of(token_id) for token_id in reversed(prompt_token_ids))
        self._spaces_to_strip = 0 if continues else token_bytes.leading_spaces

    @property
    def is_inside_character(self) -> bool:
        """Whether bytes of a character are held back that is not complete."""
        return bool(self._decoder.getstate()[0])

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that `token_ids` complete."""
        return self._strip(self._decode(b"".join(map(self._bytes_of, token_ids))))

    def finish(self) -> str:
        """Return what was held back; no more tokens come."""
        return self._strip(self._decode(b"", True))

    def _strip(self, text: str) -> str:
        if not self._spaces_to_strip or not text:
            return text
        head, tail = text[: self._spaces_to_strip], text[self._spaces_to_strip :]
        kept = head.lstrip(" ")
        self._spaces_to_strip = 0 if kept else self._spaces_to_strip - len(head)
        return kept + tail
