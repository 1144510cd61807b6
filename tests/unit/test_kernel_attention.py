"""Attention by the C++ kernels: as float64 has it, and the same bits of a row whatever is computed beside it."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise, product
from random import Random

import pytest
import torch
from torch import Tensor

from engine.attention.base import AttentionMetadata, KVCache
from engine.attention.cpu_paged import CPUPagedAttention
from engine.attention.rotary import Rotation, rotate
from engine.kernels.cpu_kernels import CPUKernels
from engine.kernels.instruction_sets import usable_instruction_sets
from engine.kernels.library import KernelLibrary

USABLE = [item.name for item in usable_instruction_sets()]
DTYPES = (torch.float32, torch.bfloat16)
SPIN_SECONDS = 1e-4
TOLERANCE = {torch.float32: 8, torch.bfloat16: 1}  # times the type's epsilon, of the largest that float64 has
# (KV heads, query heads for each, head_dim): ones, tails of vectors and of rows, as published models have them
HEADS = ((1, 1, 2), (2, 3, 6), (3, 5, 20), (1, 9, 34), (2, 1, 80), (2, 4, 64), (1, 7, 128))
BLOCK_SIZES = (1, 3, 4, 8, 16, 48)


@cache
def kernels(instruction_set: str, dtype: torch.dtype, num_threads: int) -> CPUKernels:
    library = KernelLibrary(instruction_set)
    return CPUKernels(library, library.create_pool(num_threads, None, SPIN_SECONDS), dtype)


each = pytest.mark.parametrize(
    ("instruction_set", "dtype"), [pytest.param(*pair, id=f"{pair[0]}-{pair[1]}") for pair in product(USABLE, DTYPES)]
)


@dataclass
class Text:
    """A sequence of random heads, not yet rotated, with its angles."""

    heads: Tensor  # [num_tokens, num_heads + 2 num_kv_heads, head_dim]
    rotation: Rotation
    num_kv_heads: int

    @property
    def length(self) -> int:
        return len(self.heads)


def draw_text(length: int, heads: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> Text:
    num_kv_heads, share, head_dim = heads
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(length, num_kv_heads * (share + 2), head_dim, generator=generator)
    angles = (100 * torch.rand(length, 1, head_dim // 2, generator=generator)).repeat(1, 1, 2)
    return Text(numbers.to(dtype), Rotation(angles.cos().to(dtype), angles.sin().to(dtype)), num_kv_heads)


class Paged:
    """Texts whose pages are shuffled over a cache in which whatever was not written is NaN."""

    def __init__(self, computes: CPUKernels, texts: Sequence[Text], block_size: int = 16, seed: int = 0) -> None:
        self.texts = texts
        self.done = [0] * len(texts)
        self.outputs: list[list[Tensor]] = [[] for _ in texts]
        counts = [-(-text.length // block_size) for text in texts]
        blocks = list(range(1, sum(counts) + 1))
        Random(seed).shuffle(blocks)
        self.tables = [array("i", [blocks.pop() for _ in range(count)]) for count in counts]
        heads = texts[0].heads
        shape = (sum(counts) + 1, block_size, texts[0].num_kv_heads, heads.shape[-1])
        self.cache = KVCache(*(torch.full(shape, torch.nan, dtype=heads.dtype) for _ in range(2)))
        self.kernels = computes

    def step(self, num_tokens: dict[int, int]) -> None:
        """Compute the next tokens of some texts, by their index."""
        chunks = [(i, self.done[i], self.done[i] + count) for i, count in num_tokens.items()]
        metadata = AttentionMetadata(
            cu_seqlens_q=[0, *accumulate(num_tokens.values())],
            seq_lens=[stop for _, _, stop in chunks],
            block_tables=[self.tables[i] for i, _, _ in chunks],
        )
        heads = torch.cat([self.texts[i].heads[start:stop] for i, start, stop in chunks])
        rotation = Rotation(
            *(torch.cat([self.texts[i].rotation[k][start:stop] for i, start, stop in chunks]) for k in range(2))
        )
        outputs = CPUPagedAttention(self.kernels, [self.cache], metadata)(0, heads, rotation)
        for (i, _, stop), (first, last) in zip(chunks, pairwise(metadata.cu_seqlens_q), strict=True):
            self.outputs[i].append(outputs[first:last])
            self.done[i] = stop

    def run(self, chunk_size: int) -> Tensor:
        """Compute all texts side by side in chunks, and return the first one's rows."""
        while remaining := {
            i: text.length - self.done[i] for i, text in enumerate(self.texts) if text.length > self.done[i]
        }:
            self.step({i: min(chunk_size, count) for i, count in remaining.items()})
        return self.rows(0)

    def rows(self, index: int) -> Tensor:
        return torch.cat(self.outputs[index])


def expected(text: Text) -> Tensor:
    """Attend to the whole text in float64, from what is rotated and rounded to the text's type."""
    kv, share = text.num_kv_heads, text.heads.shape[1] // text.num_kv_heads - 2
    precise = Rotation(*(x.double() for x in text.rotation))
    rotated = rotate(text.heads.double(), precise).to(text.heads.dtype).double()
    query = rotated[:, : kv * share].reshape(text.length, kv, share, -1)
    key, value = rotated[:, kv * share : -kv], text.heads[:, -kv:].double()
    scores = torch.einsum("qgsd,kgd->gsqk", query, key) * text.heads.shape[-1] ** -0.5
    later = torch.ones(text.length, text.length, dtype=torch.bool).triu(1)
    return torch.einsum("gsqk,kgd->qgsd", scores.masked_fill(later, -torch.inf).softmax(-1), value).flatten(1, 2)


def assert_close(rows: Tensor, text: Text) -> None:
    reference = expected(text)
    error = (rows.double() - reference).abs().max() / reference.abs().max()
    assert error <= TOLERANCE[rows.dtype] * torch.finfo(rows.dtype).eps


def as_bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(as_bits(a), as_bits(b))


@each
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_it_is_what_float64_has_with_any_heads_and_pages(
    instruction_set: str, dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    for seed, (length, block_size) in enumerate(zip((1, 200, 63, 2, 64, 130), BLOCK_SIZES, strict=True)):
        text = draw_text(length, heads, dtype, seed)
        assert_close(Paged(kernels(instruction_set, dtype, 1), [text], block_size, seed).run(length), text)


@each
@pytest.mark.parametrize("num_threads", [1, 3])
def test_prompts_chunks_and_decodes_in_one_step_attend_to_their_own_text(
    instruction_set: str, dtype: torch.dtype, num_threads: int
) -> None:
    random = Random(1)
    texts = [draw_text(length, (2, 3, 20), dtype, length) for length in (700, 1, 90, 17, 300, 64)]
    paged = Paged(kernels(instruction_set, dtype, num_threads), texts)
    while remaining := {i: text.length - paged.done[i] for i, text in enumerate(texts) if text.length > paged.done[i]}:
        paged.step({i: min(random.choice((1, 1, 5, 40, 200)), count) for i, count in remaining.items()})
    for index, text in enumerate(texts):
        assert_close(paged.rows(index), text)


@each
def test_a_row_has_the_same_bits_in_any_chunk_batch_page_and_number_of_threads(
    instruction_set: str, dtype: torch.dtype
) -> None:
    text = draw_text(1300, (1, 3, 36), dtype)  # three segments, which threads share where a step has little else
    others = [draw_text(length, (1, 3, 36), dtype, length) for length in (1, 400, 33)]
    alone = Paged(kernels(instruction_set, dtype, 1), [text]).run(text.length)
    assert_close(alone, text)
    for num_threads, block_size, chunk_size in ((1, 16, 7), (2, 32, 1), (3, 32, 512), (5, 16, 1), (5, 3, 2000)):
        rows = Paged(kernels(instruction_set, dtype, num_threads), [text], block_size, chunk_size).run(chunk_size)
        assert same_bits(rows, alone), (num_threads, block_size, chunk_size)
    for num_threads, block_size, chunk_size in ((1, 16, 40), (5, 16, 700), (2, 1, 100), (5, 6, 1000), (1, 8, 2000)):
        paged = Paged(kernels(instruction_set, dtype, num_threads), [text, *others], block_size, block_size)
        assert same_bits(paged.run(chunk_size), alone), (num_threads, block_size, chunk_size)


@each
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_no_row_that_does_not_see_it(
    instruction_set: str, dtype: torch.dtype, poison: float
) -> None:
    text, other = (draw_text(150, (2, 4, 16), dtype, seed) for seed in range(2))
    clean = Paged(kernels(instruction_set, dtype, 2), [text, other])
    clean.run(50)
    for head, first in ((8, 75), (10, 64), (11, 149), (9, 0)):  # keys of both KV heads are 8 and 9, values 10 and 11
        heads = text.heads.clone()
        heads[first, head] = poison
        poisoned = Paged(clean.kernels, [Text(heads, text.rotation, 2), other])
        poisoned.run(50)
        assert same_bits(poisoned.rows(1), clean.rows(1))
        ours, theirs = (x.rows(0).view(150, 2, 4, 16) for x in (poisoned, clean))
        assert same_bits(ours[:first], theirs[:first])
        assert same_bits(ours[first:, 1 - head % 2], theirs[first:, 1 - head % 2])
        assert not ours[first:, head % 2].isfinite().all(-1).any()


@each
def test_scores_of_any_size_are_weighed_as_float64_does(instruction_set: str, dtype: torch.dtype) -> None:
    for factor in (0.0, 1e-20, 30.0, 1e15):
        text = draw_text(140, (1, 2, 16), dtype)
        text.heads[:, :3] *= factor
        rows = Paged(kernels(instruction_set, dtype, 1), [text]).run(70)
        assert rows.isfinite().all()
        if factor < 1:
            assert_close(rows, text)
        if factor == 1e15:  # the largest score alone counts
            nearest = expected(text)
            assert (rows.double() - nearest).abs().max() <= torch.finfo(dtype).eps * nearest.abs().max()


@each
def test_a_text_reads_what_another_writes_in_the_same_step(instruction_set: str, dtype: torch.dtype) -> None:
    text = draw_text(64, (2, 2, 16), dtype)
    head = Text(text.heads[:48], Rotation(*(x[:48] for x in text.rotation)), 2)
    paged = Paged(kernels(instruction_set, dtype, 2), [text, head])
    paged.tables[0][:3] = paged.tables[1]
    paged.done[0] = 48
    paged.step({0: 16, 1: 48})
    alone = Paged(paged.kernels, [text]).run(64)
    assert same_bits(paged.rows(0), alone[48:])
    assert same_bits(paged.rows(1), alone[:48])


@each
def test_only_the_slots_of_its_tokens_are_written(instruction_set: str, dtype: torch.dtype) -> None:
    for block_size in BLOCK_SIZES:
        text = draw_text(9, (2, 1, 6), dtype)
        paged = Paged(kernels(instruction_set, dtype, 1), [text], block_size)
        paged.run(4)
        assert [int((~x.isnan()).sum()) for x in paged.cache] == [9 * 2 * 6] * 2


@each
def test_a_step_may_hold_texts_without_tokens(instruction_set: str, dtype: torch.dtype) -> None:
    texts = [draw_text(20, (1, 2, 8), dtype, seed) for seed in range(2)]
    paged = Paged(kernels(instruction_set, dtype, 1), texts)
    paged.step({0: 20, 1: 0})
    paged.step({0: 0, 1: 20})
    for index, text in enumerate(texts):
        assert_close(paged.rows(index), text)
