"""What sampling needs to know of a row. Made by the scheduler; never imports torch."""

from typing import NamedTuple

from engine.protocol.messages import SamplingParams


class SamplingRow(NamedTuple):
    """A sequence whose next token is sampled. Both lists are the sequence's own: not to be changed."""

    params: SamplingParams
    token_ids: list[int]  # prompt and outputs
    num_prompt_tokens: int

    @property
    def position(self) -> int:
        """Index in the sequence of the token being sampled."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) - self.num_prompt_tokens
