"""The one source of randomness: Philox4x32-10, and the noise of a token as a pure function of where it stands.

Philox4x32-10 is the counter-based generator of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
It keeps no state: equal counters and keys give equal outputs, on every device and in any order.

The noise of token id `t`, were it chosen at position `p` of choice `c` of a request with seed `s`:

    key      = (s mod 2^32, s div 2^32)
    counter  = (p, c, t div 4, 0)
    x        = output number t mod 4 of Philox4x32-10
    u        = (x + 1/2) / 2^32                    exact in float64; 2^-33 <= u <= 1 - 2^-33
    gumbel   = float32(-log(-log(u)))              both logarithms in float64

`x` and `u` are the same on every device. Logarithms of CPU and CUDA may differ by a few units in the last place of
float64; rounding to float32, which has 29 bits less, should hide that in all but about one of 10^8 values.

All words are unsigned 32-bit numbers held in int64 tensors, since torch computes little in unsigned types. A product of
two words may pass 2^63; it then wraps modulo 2^64, and the masks below take the right bits of it all the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 10
WORD_MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
TOKENS_PER_COUNTER = 4


class Words4(NamedTuple):
    """Four 32-bit words: a counter, or what comes out for it."""

    x0: Tensor
    x1: Tensor
    x2: Tensor
    x3: Tensor


class NoiseSource(NamedTuple):
    """Where each row's noise comes from: `[num_rows, 1]` int64 tensors of 32-bit words."""

    seed_low: Tensor
    seed_high: Tensor
    choice: Tensor
    position: Tensor

    def rows(self, index: Tensor | slice) -> "NoiseSource":
        """Return the source of some of the rows."""
        return NoiseSource(*(words[index] for words in self))


def noise_source(
    seeds: Sequence[int], choices: Sequence[int], positions: Sequence[int], device: torch.device
) -> NoiseSource:
    """Return the noise source of rows with these seeds (below 2^64), choice indices and positions (below 2^32)."""
    words = [
        [seed & WORD_MASK for seed in seeds],
        [seed >> 32 & WORD_MASK for seed in seeds],
        list(choices),
        list(positions),
    ]
    table = torch.tensor(words, dtype=torch.int64).to(device)
    return NoiseSource(*table.unsqueeze(-1))


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and the low word of a 64-bit product."""
    product = word * multiplier
    return (product >> 32).bitwise_and_(WORD_MASK), product.bitwise_and_(WORD_MASK)


def philox4x32(counter: Words4, key: tuple[Tensor, Tensor]) -> Words4:
    """Return Philox4x32-10 of each counter. All shapes broadcast; parts that do not vary are computed once."""
    x0, x1, x2, x3 = counter
    key0, key1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], x0)
        high1, low1 = _multiply(MULTIPLIERS[1], x2)
        x0, x1, x2, x3 = high1 ^ (x1 ^ key0), low1, high0 ^ (x3 ^ key1), low0
        key0, key1 = key0 + KEY_INCREMENTS[0] & WORD_MASK, key1 + KEY_INCREMENTS[1] & WORD_MASK
    return Words4(x0, x1, x2, x3)


def to_uniform(words: Tensor) -> Tensor:
    """Return 32-bit words as float64 strictly between 0 and 1, exactly `(x + 1/2) / 2^32`."""
    return words.to(torch.float64).add_(0.5).mul_(2.0**-32)


def to_gumbel(words: Tensor) -> Tensor:
    """Return 32-bit words as float32 numbers of the standard Gumbel distribution, between -3.2 and 22.9."""
    return to_uniform(words).log_().neg_().log_().neg_().to(torch.float32)


def _words(source: NoiseSource, counters: Tensor) -> Words4:
    start = Words4(source.position, source.choice, counters, torch.zeros_like(source.position))
    return philox4x32(start, (source.seed_low, source.seed_high))


def vocabulary_noise(source: NoiseSource, vocab_size: int) -> Tensor:
    """Return the Gumbel noise of every token, `[num_rows, vocab_size]` float32."""
    num_counters = -(-vocab_size // TOKENS_PER_COUNTER)
    counters = torch.arange(num_counters, device=source.position.device).unsqueeze(0)
    words = torch.stack(_words(source, counters), dim=-1)
    return to_gumbel(words.flatten(1)[:, :vocab_size])


def token_noise(source: NoiseSource, token_ids: Tensor) -> Tensor:
    """Return the Gumbel noise of some tokens, `[num_rows, n]` float32 for token ids `[num_rows, n]` int64."""
    words = torch.stack(_words(source, token_ids // TOKENS_PER_COUNTER), dim=-1)
    lanes = (token_ids % TOKENS_PER_COUNTER).unsqueeze(-1)
    return to_gumbel(words.gather(-1, lanes).squeeze(-1))
