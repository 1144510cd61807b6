"""Attention over pages gives what attention over whole sequences gives, however they are stored and chunked."""

import random
from array import array
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.attention.base import AttentionMetadata, KVCache
from engine.attention.dense import DenseCausalAttention
from engine.attention.rotary import Rotation
from engine.attention.torch_paged import SHORT, PagedAttention

HEAD_DIM = 6
FLOAT64 = torch.float64


@dataclass
class Sequence:
    """One whole sequence of random queries, keys and values, `[num_tokens, heads, HEAD_DIM]`, and its pages."""

    query: Tensor
    key: Tensor
    value: Tensor
    blocks: list[int]


def converted(sequence: Sequence, dtype: torch.dtype) -> Sequence:
    query, key, value = (x.to(dtype) for x in (sequence.query, sequence.key, sequence.value))
    return Sequence(query, key, value, sequence.blocks)


def expected(sequence: Sequence, start: int, stop: int) -> Tensor:
    """Attend from tokens `start:stop`, by the definition: one head and one token at a time."""
    out = torch.empty_like(sequence.query[start:stop])
    share = sequence.query.shape[1] // sequence.key.shape[1]
    for token in range(start, stop):
        for head in range(sequence.query.shape[1]):
            keys = sequence.key[: token + 1, head // share]
            values = sequence.value[: token + 1, head // share]
            scores = keys @ sequence.query[token, head] * HEAD_DIM**-0.5
            out[token - start, head] = scores.softmax(0) @ values
    return out


def make_sequences(
    lengths: list[int], heads: tuple[int, int], block_size: int, seed: int
) -> tuple[list[Sequence], int]:
    """Draw sequences whose pages are shuffled over the cache; return them and the number of blocks."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // block_size) for length in lengths]
    blocks = list(range(1, sum(counts) + 3))  # block 0, by which tables are padded, is nobody's
    random.Random(seed).shuffle(blocks)
    sequences = []
    for length, count in zip(lengths, counts, strict=True):
        query, key, value = (
            torch.randn(length, num_heads, HEAD_DIM, generator=generator, dtype=FLOAT64)
            for num_heads in (heads[0], heads[1], heads[1])
        )
        sequences.append(Sequence(query, key, value, blocks=[blocks.pop() for _ in range(count)]))
    return sequences, sum(counts) + 3


def metadata_of(chunks: list[tuple[Sequence, int, int]]) -> AttentionMetadata:
    return AttentionMetadata(
        cu_seqlens_q=[0, *accumulate(stop - start for _, start, stop in chunks)],
        seq_lens=[stop for _, _, stop in chunks],
        block_tables=[array("i", sequence.blocks) for sequence, _, _ in chunks],
    )


def unturned(query: Tensor) -> Rotation:
    """The rotation that changes nothing."""
    return Rotation(query.new_ones(len(query), 1, HEAD_DIM), query.new_zeros(len(query), 1, HEAD_DIM))


def run_step(caches: list[KVCache], layer: int, chunks: list[tuple[Sequence, int, int]]) -> Tensor:
    query, key, value = (
        torch.cat([getattr(sequence, name)[start:stop] for sequence, start, stop in chunks])
        for name in ("query", "key", "value")
    )
    attend = PagedAttention(caches, metadata_of(chunks))
    return attend(layer, torch.cat((query, key, value), dim=1), unturned(query))


def poisoned_caches(num_blocks: int, block_size: int, kv_heads: int, num_layers: int = 1) -> list[KVCache]:
    """Caches in which every slot not yet written holds NaN."""
    shape = (num_blocks, block_size, kv_heads, HEAD_DIM)
    nan = float("nan")
    return [
        KVCache(torch.full(shape, nan, dtype=FLOAT64), torch.full(shape, nan, dtype=FLOAT64)) for _ in range(num_layers)
    ]


def check(outputs: Tensor, chunks: list[tuple[Sequence, int, int]]) -> None:
    reference = torch.cat([expected(*chunk) for chunk in chunks])
    torch.testing.assert_close(outputs, reference, rtol=1e-10, atol=1e-12)


@st.composite
def chunk_sizes(draw: st.DrawFn) -> list[list[int]]:
    """For each sequence the tokens of each of its steps: prompts in chunks, then decodes of one token."""
    num_sequences = draw(st.integers(1, 5))
    prompts = [draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)) for _ in range(num_sequences)]
    return [[*prompt, *[1] * draw(st.integers(0, 3))] for prompt in prompts]


@given(
    steps_of=chunk_sizes(),
    kv_heads=st.integers(1, 3),
    share=st.integers(1, 4),
    block_size=st.sampled_from([1, 3, 4, 16]),
    seed=st.integers(0, 2**32),
)
def test_chunks_and_decodes_in_one_batch_attend_to_their_own_sequence(
    steps_of: list[list[int]], kv_heads: int, share: int, block_size: int, seed: int
) -> None:
    lengths = [sum(steps) for steps in steps_of]
    sequences, num_blocks = make_sequences(lengths, (kv_heads * share, kv_heads), block_size, seed)
    caches = poisoned_caches(num_blocks, block_size, kv_heads)
    done = [0] * len(sequences)
    for step in range(max(map(len, steps_of))):
        chunks = []
        for i, steps in enumerate(steps_of):
            if step < len(steps) and steps[step]:
                chunks.append((sequences[i], done[i], done[i] + steps[step]))
                done[i] += steps[step]
        if chunks:
            check(run_step(caches, 0, chunks), chunks)


def test_a_long_sequence_beside_short_ones_changes_neither() -> None:
    lengths = [2 * SHORT + 5, 3, SHORT - 1, SHORT, 1, 2 * SHORT]
    sequences, num_blocks = make_sequences(lengths, (4, 2), 16, seed=1)
    caches = poisoned_caches(num_blocks, 16, 2)
    prompts = [(sequence, 0, length - 1) for sequence, length in zip(sequences, lengths, strict=True) if length > 1]
    run_step(caches, 0, prompts)
    decodes = [(sequence, length - 1, length) for sequence, length in zip(sequences, lengths, strict=True)]
    check(run_step(caches, 0, decodes), decodes)


def test_each_layer_has_its_own_cache() -> None:
    (one, other), num_blocks = make_sequences([7, 7], (2, 1), 4, seed=2)
    other.blocks = one.blocks
    caches = poisoned_caches(num_blocks, 4, 1, num_layers=2)
    for stop in (6, 7):
        start = 0 if stop == 6 else 6
        for layer, sequence in enumerate((one, other)):
            check(run_step(caches, layer, [(sequence, start, stop)]), [(sequence, start, stop)])


def test_pages_of_other_sequences_are_left_alone() -> None:
    (sequence,), num_blocks = make_sequences([9], (2, 2), 4, seed=3)
    caches = poisoned_caches(num_blocks, 4, 2)
    run_step(caches, 0, [(sequence, 0, 9)])
    for cache, written in zip(caches[0], (sequence.key, sequence.value), strict=True):
        slots = [sequence.blocks[p // 4] * 4 + p % 4 for p in range(9)]
        assert torch.equal(cache.flatten(0, 1)[slots], written)
        assert int((~cache.isnan()).sum()) == written.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_stays_close(dtype: torch.dtype) -> None:
    (sequence,), num_blocks = make_sequences([40], (4, 2), 16, seed=4)
    caches = [KVCache(*(x.to(dtype) for x in cache)) for cache in poisoned_caches(num_blocks, 16, 2)]
    rounded = converted(sequence, dtype)
    exact = converted(rounded, FLOAT64)
    tolerance = 8 * torch.finfo(dtype).eps
    for start, stop in ((0, 30), (30, 39), (39, 40)):
        output = run_step(caches, 0, [(rounded, start, stop)])
        assert output.dtype == dtype
        reference = expected(exact, start, stop)
        assert (output.double() - reference).abs().max() <= tolerance * reference.abs().max()


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), share=st.integers(1, 3), seed=st.integers(0, 99))
def test_dense_attention_attends_within_each_packed_sequence(lengths: list[int], share: int, seed: int) -> None:
    sequences, _ = make_sequences(lengths, (2 * share, 2), 4, seed)
    query, key, value = (torch.cat([getattr(s, name) for s in sequences]) for name in ("query", "key", "value"))
    output = DenseCausalAttention([0, *accumulate(lengths)], 2)(
        0, torch.cat((query, key, value), dim=1), unturned(query)
    )
    reference = torch.cat([expected(s, 0, n) for s, n in zip(sequences, lengths, strict=True)])
    torch.testing.assert_close(output, reference, rtol=1e-10, atol=1e-12)


def test_gradients_of_dense_attention_are_those_of_its_definition() -> None:
    (sequence,), _ = make_sequences([6], (4, 2), 4, seed=5)
    tensors = (sequence.query, sequence.key, sequence.value)
    weights = torch.randn(6, 4, HEAD_DIM, generator=torch.Generator().manual_seed(6), dtype=FLOAT64)
    ours = [tensor.clone().requires_grad_() for tensor in tensors]
    attended = DenseCausalAttention([0, 6], 2)(0, torch.cat(ours, dim=1), unturned(sequence.query))
    torch.autograd.backward((attended * weights).sum())
    defined = [tensor.clone().requires_grad_() for tensor in tensors]
    rows = [
        (defined[1][: t + 1, h // 2] @ defined[0][t, h] * HEAD_DIM**-0.5).softmax(0) @ defined[2][: t + 1, h // 2]
        for t in range(6)
        for h in range(4)
    ]
    torch.autograd.backward((torch.stack(rows).view(6, 4, HEAD_DIM) * weights).sum())
    for tensor, reference in zip(ours, defined, strict=True):
        torch.testing.assert_close(tensor.grad, reference.grad, rtol=1e-9, atol=1e-11)
