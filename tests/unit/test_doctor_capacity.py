"""Whether a model fits and collectives are fast, from what ranks measured."""

from dataclasses import replace

import pytest

from engine.doctor.capacity import agreed_start, missing_memory, weights_fit
from engine.doctor.group import all_reduce_times
from engine.doctor.messages import Capacity, RankReport
from engine.doctor.rank import LARGE, SMALL
from engine.protocol.checks import CheckStatus
from engine.protocol.config import EMBEDDED_MODEL, EngineConfig
from engine.protocol.model_config import ModelConfig

GIB = 1 << 30


def capacity(*, weights: int = 1, free: int = GIB, blocks: int = 10) -> Capacity:
    return Capacity(
        weight_bytes=weights,
        bytes_per_token=weights,
        free_memory=free,
        kv_block_bytes=1024,
        num_kv_blocks=blocks,
        error="",
        read_bandwidth=1e9,
    )


@pytest.mark.parametrize(
    ("weights", "shares_memory", "fits"),
    [(GIB // 2, True, True), (GIB // 2 + 1, True, False), (GIB, False, True), (GIB + 1, False, False)],
)
def test_weights_of_all_ranks_must_fit_the_host_and_each_ranks_its_device(
    weights: int, shares_memory: bool, fits: bool
) -> None:
    found = weights_fit([capacity(weights=weights)] * 2, shares_memory=shares_memory)
    assert found.status is (CheckStatus.OK if fits else CheckStatus.FAILURE)


def test_the_fullest_device_counts() -> None:
    found = weights_fit([capacity(weights=10), capacity(weights=10, free=9)], shares_memory=False)
    assert found.status is CheckStatus.FAILURE


def test_weights_and_full_caches_of_all_ranks_count_against_the_hosts_memory() -> None:
    ranks = [capacity(weights=500, free=10_000), capacity(weights=500, free=9_000)]
    assert missing_memory(ranks, 4) == 2 * (500 + 4 * 1024) - 9_000


def test_the_smallest_rank_holds_for_all_as_in_serving() -> None:
    config = ModelConfig.from_directory(EMBEDDED_MODEL)
    start = agreed_start(EngineConfig(), config, [capacity(blocks=9), capacity(blocks=7)])
    assert (start.num_kv_blocks, start.max_model_len) == (7, 7 * 16)
    with pytest.raises(ValueError, match="--max-model-len 113 does not fit: the KV cache holds 112 tokens"):
        agreed_start(replace(EngineConfig(), max_model_len=113), config, [capacity(blocks=7)])


@pytest.mark.parametrize(("seconds", "status"), [(0.0049, CheckStatus.OK), (0.0051, CheckStatus.WARNING)])
def test_an_all_reduce_of_a_mebibyte_is_slow_from_5_ms_on(seconds: float, status: CheckStatus) -> None:
    times = {SMALL: [1e-4, 2e-4, 9e-4], LARGE: [seconds] * 3}
    reports = [
        RankReport(
            epoch=1,
            rank=rank,
            num_threads=1,
            join_seconds=0.1,
            are_sums_right=True,
            all_reduce_seconds=times,
            read_bandwidth=1e9,
            capacity=capacity(),
        )
        for rank in range(2)
    ]
    found = all_reduce_times(reports)
    assert found.status is status
    assert found.detail.startswith("4.0 KiB in 200 µs (median; at most 900 µs); 1.0 MiB in ")
    assert all_reduce_times(reports[:1]).status is CheckStatus.SKIPPED
