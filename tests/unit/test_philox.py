"""Philox4x32-10 against the published vectors, against whole-number arithmetic, and the noise made from it."""

import math
import random

import pytest
import torch

from engine.sampling.philox import (
    Words4,
    noise_source,
    philox4x32,
    to_gumbel,
    to_uniform,
    token_noise,
    vocabulary_noise,
)

CPU = torch.device("cpu")
WORD = 2**32

# counter, key, output: the known answers for philox4x32-10 of the authors' Random123 library.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)

# seed, choice, position, token, its noise as float32: whole numbers up to u, then both logarithms with 40 digits. What
# any other implementation is held to.
NOISE_ANSWERS = (
    (0, 0, 0, 0, "0x1.5b6c7ap-4"),
    (0, 0, 1, 3, "-0x1.313390p+0"),
    (7, 0, 1, 128255, "-0x1.6dcd6ap-1"),
    (7, 1, 37, 4, "0x1.218140p+1"),
    (42, 0, 100, 2, "0x1.9b846ap+0"),
    (2**32, 0, 1, 0, "0x1.80d27ep+0"),
    (1234567890123456789, 12, 4096, 50257, "0x1.bb5da8p-1"),
    (0xFEDCBA9876543210, 3, 70_000, 10, "-0x1.ae718ap-4"),
    (2**64 - 1, 0, 131_071, 1, "-0x1.d8a88cp-2"),
    (2**64 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1, "-0x1.eded5cp-5"),
)


def computed(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    words = philox4x32(Words4(*map(torch.tensor, counter)), (torch.tensor(key[0]), torch.tensor(key[1])))
    return tuple(int(word) for word in words)


def by_whole_numbers(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """The paper's definition in Python's unbounded integers."""
    x0, x1, x2, x3 = counter
    key0, key1 = key
    for _ in range(10):
        product0, product1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = product1 // WORD ^ x1 ^ key0, product1 % WORD, product0 // WORD ^ x3 ^ key1, product0 % WORD
        key0, key1 = (key0 + 0x9E3779B9) % WORD, (key1 + 0xBB67AE85) % WORD
    return x0, x1, x2, x3


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_the_published_answers_come_out(
    counter: tuple[int, ...], key: tuple[int, int], output: tuple[int, ...]
) -> None:
    assert computed(counter, key) == output


def test_words_of_every_size_give_what_whole_number_arithmetic_gives() -> None:
    draw = random.Random(1)
    for _ in range(200):
        counter = tuple(draw.getrandbits(draw.randint(1, 32)) for _ in range(4))
        key = draw.getrandbits(32), draw.getrandbits(32)
        assert computed(counter, key) == by_whole_numbers(counter, key)


def test_the_noise_of_a_token_follows_the_definition() -> None:
    seed, choice, position, vocab_size = 0xFEDCBA9876543210, 3, 70_000, 11
    noise = vocabulary_noise(noise_source([seed], [choice], [position], CPU), vocab_size)
    for token in range(vocab_size):
        words = by_whole_numbers((position, choice, token // 4, 0), (seed % WORD, seed // WORD))
        uniform = (words[token % 4] + 0.5) / WORD
        assert noise[0, token].item() == pytest.approx(-math.log(-math.log(uniform)), rel=1e-6)


@pytest.mark.parametrize(("seed", "choice", "position", "token", "noise"), NOISE_ANSWERS)
def test_the_noise_of_a_token_is_the_committed_one_to_the_last_bit(
    seed: int, choice: int, position: int, token: int, noise: str
) -> None:
    source = noise_source([seed], [choice], [position], CPU)
    assert token_noise(source, torch.tensor([[token]])).item() == float.fromhex(noise)


def test_the_noise_of_some_tokens_is_that_of_the_whole_vocabulary() -> None:
    source = noise_source([1, 2**64 - 1, 7], [0, 1, 2], [5, 6, 2**31], CPU)
    whole = vocabulary_noise(source, 1009)
    ids = torch.tensor([[0, 1008, 17, 5], [4, 4, 3, 2], [1000, 999, 998, 1]])
    assert torch.equal(token_noise(source, ids), whole.gather(1, ids))


def test_a_rows_noise_does_not_depend_on_the_other_rows() -> None:
    together = vocabulary_noise(noise_source([1, 2, 3], [0, 0, 1], [9, 8, 7], CPU), 500)
    alone = vocabulary_noise(noise_source([2], [0], [8], CPU), 500)
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("other", [(6, 0, 9), (5 + 2**32, 0, 9), (5 + 2**63, 0, 9), (5, 1, 9), (5, 0, 10)])
def test_seed_choice_and_position_each_change_all_noise(other: tuple[int, int, int]) -> None:
    first, second = (
        vocabulary_noise(noise_source([seed], [choice], [position], CPU), 256)
        for seed, choice, position in ((5, 0, 9), other)
    )
    assert int((first == second).sum()) == 0


def test_uniform_numbers_are_exact_and_never_0_or_1() -> None:
    uniform = to_uniform(torch.tensor([0, 1, 2**31, 2**32 - 1]))
    assert uniform.tolist() == [2**-33, 3 * 2**-33, 0.5 + 2**-33, 1 - 2**-33]


def test_gumbel_noise_is_finite_at_both_ends() -> None:
    ends = to_gumbel(torch.tensor([0, 2**32 - 1]))
    assert ends.tolist() == pytest.approx([-math.log(33 * math.log(2)), 33 * math.log(2)], rel=1e-6)


def test_noise_has_the_gumbel_distribution() -> None:
    """Kolmogorov-Smirnov: the largest gap passes 1.95 / sqrt(n) once in a thousand sequences."""
    noise = vocabulary_noise(noise_source([2024], [0], [17], CPU), 200_000)[0].double().sort().values
    theory = (-(-noise).exp()).exp()
    steps = torch.arange(1, len(noise) + 1) / len(noise)
    assert (theory - steps).abs().max() < 1.95 / math.sqrt(len(noise))
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)


def test_noise_of_neighbouring_tokens_positions_and_seeds_is_uncorrelated() -> None:
    seeds, positions = [s for s in range(50) for _ in range(50)], list(range(50)) * 50
    noise = vocabulary_noise(noise_source(seeds, [0] * 2500, positions, CPU), 40).view(50, 50, 40)
    for dim in range(3):
        near, far = noise.narrow(dim, 0, noise.shape[dim] - 1), noise.narrow(dim, 1, noise.shape[dim] - 1)
        correlation = torch.corrcoef(torch.stack((near.flatten(), far.flatten())))[0, 1].item()
        assert abs(correlation) < 4 / math.sqrt(near.numel())
