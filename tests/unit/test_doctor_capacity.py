"""Whether a model fits and collectives are fast, from what ranks measured."""

from dataclasses import replace
from pathlib import Path

import pytest

from engine.doctor.capacity import agreed_start, missing_memory, weights_fit
from engine.doctor.capacity import checks as capacity_checks
from engine.doctor.group import all_reduce_times
from engine.doctor.messages import Capacity, RankReport
from engine.doctor.rank import LARGE, SMALL
from engine.doctor.subject import Subject
from engine.protocol.checks import CheckStatus
from engine.protocol.config import EMBEDDED_MODEL, EngineConfig, RankSpec
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
        best_read_bandwidth=1e9,
    )


def report(rank: int, *, small: list[float], large: list[float], of: Capacity | None = None) -> RankReport:
    return RankReport(
        epoch=1,
        rank=rank,
        num_threads=1,
        join_seconds=0.1,
        are_sums_right=True,
        all_reduce_seconds={SMALL: small, LARGE: large},
        read_bandwidth=1e9,
        capacity=of or capacity(),
        carrier="shared-memory",
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
    reports = [report(rank, small=[1e-4, 2e-4, 9e-4], large=[seconds] * 3) for rank in range(2)]
    found = all_reduce_times(reports)
    assert found.status is status
    assert found.detail.startswith("shared-memory: 4.0 KiB in 200 µs (median; at most 900 µs); 1.0 MiB in ")
    assert all_reduce_times(reports[:1]).status is CheckStatus.SKIPPED


def test_the_speed_limit_is_the_best_of_the_slowest_rank() -> None:
    """Reading a million bytes takes 1 ms, and each of the 2 * 6 + 1 all-reduces 1 ms at best on rank 1."""
    subject = Subject(RankSpec(engine=EngineConfig(tensor_parallel_size=2), epoch=1, run_dir="unused"), Path("unused"))
    subject.model = ModelConfig.from_directory(EMBEDDED_MODEL)
    subject.reports = [
        report(0, small=[5e-4, 9e-3, 9e-3], large=[1.0], of=capacity(weights=10**6)),
        report(1, small=[9e-3, 1e-3, 9e-3], large=[1.0], of=capacity(weights=10**6)),
    ]
    (limit,) = (check.run() for check in capacity_checks(subject) if check.name == "speed limit")
    assert limit.detail.startswith("at most 1000 tokens/s for one request")
    assert "at most 71 with the 13 all-reduces of a token, 1.0 ms each at best" in limit.detail
