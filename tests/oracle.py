"""What `transformers` says in float32: the reference that our outputs are held to."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

# A first difference is allowed only where the reference's two best logits lie closer than this share of the largest.
NEAR_TIE = 1e-3


@dataclass
class Comparison:
    """How many tokens were held against the reference, and how many near-ties went the other way."""

    tokens: int = 0
    near_ties: int = 0


class Reference:
    """A checkpoint as transformers loads it."""

    def __init__(self, directory: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self._model.eval()  # type: ignore[no-untyped-call]  # transformers leaves it untyped

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """Return the logits after each token, `[num_tokens, vocab_size]`."""
        logits: torch.Tensor = self._model(torch.tensor([token_ids])).logits[0]
        return logits

    def check_greedy(self, prompt: list[int], output: list[int], comparison: Comparison) -> None:
        """Check that each output token is the greedy choice after what precedes it.

        Up to the first near-tie this is the reference's own greedy text; beyond one it is the reference's continuation
        of the text that took the other branch.
        """
        logits = self.logits(prompt + output[:-1])[len(prompt) - 1 :]
        best, choice = logits.max(dim=1)
        for position, token in enumerate(output):
            comparison.tokens += 1
            if token == choice[position]:
                continue
            two_best = logits[position].topk(2)
            gap = (two_best.values[0] - two_best.values[1]).item()
            scale = logits[position].abs().max().item()
            assert gap <= NEAR_TIE * scale, f"token {position}: {token}, the reference has {choice[position]} by {gap}"
            assert token in two_best.indices, f"token {position}: {token} is none of the reference's two best"
            assert best[position] - logits[position, token] <= NEAR_TIE * scale
            comparison.near_ties += 1
