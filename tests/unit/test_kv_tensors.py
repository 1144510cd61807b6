"""How many KV blocks a rank holds, what they weigh, and what is said when they do not fit."""

from collections.abc import Callable
from dataclasses import replace

import psutil
import pytest
import torch

from engine.protocol.config import EngineConfig
from engine.protocol.model_config import ModelConfig
from engine.worker import host
from engine.worker.kv_tensors import allocate, block_bytes, free_memory_share, largest_cache, num_blocks_that_fit
from tests.configs import model_config

CPU = torch.device("cpu")
MODEL = model_config(num_hidden_layers=3, num_attention_heads=6, hidden_size=30, head_dim=5, max_position_embeddings=70)


def fitting(engine: EngineConfig, *, free_memory: int, most_memory: int = 10**10) -> int:
    return num_blocks_that_fit(engine, MODEL, bytes_per_block=1000, free_memory=free_memory, most_memory=most_memory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_a_blocks_bytes_are_those_of_the_tensors(dtype: torch.dtype, num_kv_heads: int) -> None:
    caches = allocate(MODEL, num_blocks=11, block_size=4, num_kv_heads=num_kv_heads, dtype=dtype, device=CPU)
    size = sum(cache.key.nbytes + cache.value.nbytes for cache in caches)
    assert size == 11 * block_bytes(MODEL, block_size=4, num_kv_heads=num_kv_heads, dtype=dtype)


def test_each_layer_has_zeroed_keys_and_values_of_its_own() -> None:
    caches = allocate(MODEL, num_blocks=11, block_size=4, num_kv_heads=2, dtype=torch.float16, device=CPU)
    tensors = [tensor for cache in caches for tensor in cache]
    assert [tensor.shape for tensor in tensors] == [(11, 4, 2, 5)] * (2 * MODEL.num_hidden_layers)
    for index, tensor in enumerate(tensors):
        assert tensor.dtype == torch.float16
        assert not tensor.any()  # filled below: it would not be zero if an earlier one shared its memory
        tensor.fill_(index + 1)


def test_memory_is_taken_only_as_blocks_are_written(tell: Callable[[str], None]) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    cache, *_ = allocate(MODEL, num_blocks=200_000, block_size=16, num_kv_heads=2, dtype=torch.float32, device=CPU)
    allocated = process.memory_info().rss - before
    cache.key.fill_(1)
    written = process.memory_info().rss - before
    tell(f"{6 * cache.key.nbytes} bytes allocated: {allocated} resident; {cache.key.nbytes} written: {written}")
    assert allocated < cache.key.nbytes // 2
    assert cache.key.nbytes // 2 < written < 2 * cache.key.nbytes


def test_explicit_blocks_win_over_all_that_is_free() -> None:
    assert fitting(EngineConfig(num_kv_blocks=123), free_memory=5000) == 123


def test_cache_memory_holds_as_many_whole_blocks_as_fit_into_it() -> None:
    assert fitting(EngineConfig(kv_cache_memory=7999), free_memory=0) == 7


def test_cache_memory_may_hold_more_than_all_sequences_could_use() -> None:
    assert fitting(EngineConfig(kv_cache_memory=10**9, max_num_seqs=1), free_memory=0) == 10**6


def test_free_memory_holds_as_many_whole_blocks_as_fit_into_it() -> None:
    assert fitting(EngineConfig(), free_memory=7999) == 7


@pytest.mark.parametrize(
    ("max_model_len", "most"),
    [
        (None, 3 * 5),  # the model's 70 tokens
        (48, 3 * 3),
        (49, 3 * 4),
    ],
)
def test_free_memory_is_not_taken_beyond_a_full_context_for_every_sequence(
    max_model_len: int | None, most: int
) -> None:
    engine = EngineConfig(max_num_seqs=3, block_size=16, max_model_len=max_model_len)
    assert fitting(engine, free_memory=10**9) == most
    assert fitting(engine, free_memory=1000 * most - 1) == most - 1


def test_free_memory_is_not_taken_beyond_a_sliding_window_for_every_sequence() -> None:
    model = replace(MODEL, sliding_window=33)
    engine = EngineConfig(max_num_seqs=3, block_size=16)
    found = num_blocks_that_fit(engine, model, bytes_per_block=1000, free_memory=10**9, most_memory=10**10)
    assert found == 3 * 3


def test_cache_memory_below_one_block_is_refused_by_its_option() -> None:
    with pytest.raises(ValueError, match=r"^--kv-cache-memory does not hold one KV block of 1000 bytes$"):
        fitting(EngineConfig(kv_cache_memory=999), free_memory=10**9)


@pytest.mark.parametrize("engine", [EngineConfig(num_kv_blocks=8), EngineConfig(kv_cache_memory=8999)])
def test_an_explicit_size_that_memory_can_never_hold_is_refused_with_its_size(engine: EngineConfig) -> None:
    assert fitting(engine, free_memory=0, most_memory=8000) == 8
    with pytest.raises(ValueError, match=r"^cannot allocate 8 KV blocks \(8000 bytes\); lower --num-kv-blocks or "):
        fitting(engine, free_memory=0, most_memory=7999)


def test_free_memory_below_one_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^free memory does not hold one KV block of 1000 bytes$"):
        fitting(EngineConfig(), free_memory=999)


@pytest.mark.parametrize("num_blocks", [2**40, 2**62], ids=["more than any memory", "more than 64 bits"])
def test_blocks_that_cannot_be_had_are_refused_with_their_size_and_the_options(num_blocks: int) -> None:
    size = num_blocks * block_bytes(MODEL, block_size=16, num_kv_heads=2, dtype=torch.float32)
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the whole message is compared
        allocate(MODEL, num_blocks=num_blocks, block_size=16, num_kv_heads=2, dtype=torch.float32, device=CPU)
    assert str(error.value) == (
        f"cannot allocate {num_blocks} KV blocks ({size} bytes); lower --num-kv-blocks or --kv-cache-memory"
    )


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_ranks_on_a_host_share_all_of_its_memory_beside_their_weights(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "total_memory", lambda: 6000)
    assert largest_cache(CPU, ranks, weight_bytes=500) == 6000 // ranks - 500


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_ranks_on_a_host_share_half_of_its_free_memory(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "free_memory", lambda: 6000)
    assert free_memory_share(CPU, ranks) == 3000 // ranks


def test_a_larger_model_has_larger_blocks() -> None:
    def size(model: ModelConfig) -> int:
        return block_bytes(model, block_size=4, num_kv_heads=2, dtype=torch.float32)

    assert size(replace(MODEL, num_hidden_layers=6)) == size(replace(MODEL, head_dim=10)) == 2 * size(MODEL)
