"""What becomes of the engine's word and of measured times in the metrics."""

import pytest

from engine.protocol.config import EngineConfig
from engine.protocol.messages import (
    GroupState,
    GroupStatus,
    HistogramDelta,
    RankInfo,
    RankStats,
    SchedulerStats,
    StatsReport,
)
from engine.protocol.stats import TIME_BUCKETS
from server.metrics.metrics import Metrics
from tests.metric_samples import sample_lines, value_of

SCHEDULER = SchedulerStats(1, 2, 64, 16, 0, 1, 0)


def lines_of(metrics: Metrics, name: str) -> list[str]:
    return [line for line in sample_lines(metrics.render("")[0].decode()) if line.startswith(f"ryzanstein_{name}{{")]


def ready(epoch: int, device: str, num_kv_blocks: int, kernels: str) -> GroupStatus:
    return GroupStatus(
        epoch, GroupState.READY, [RankInfo(0, 4711, "here", device)], num_kv_blocks=num_kv_blocks, kernels=kernels
    )


def report(seconds: float, waiting: float | None, num_bytes: int) -> StatsReport:
    counts = [0] * len(TIME_BUCKETS) + [1]
    collectives = {"all_reduce": HistogramDelta(counts, seconds)} if seconds else {}
    waits = {} if waiting is None else {"all_reduce": HistogramDelta(counts, waiting)}
    rank = RankStats(1, 3, collectives, {}, waits, "gloo", 2, {"all_reduce": num_bytes})
    return StatsReport(1, SCHEDULER, [rank])


def test_what_runs_is_what_is_ready_now() -> None:
    metrics = Metrics("m", EngineConfig(quantization="int8", tensor_parallel_size=2, block_size=32), "bfloat16")
    assert lines_of(metrics, "engine_info") == lines_of(metrics, "cache_config_info") == []
    metrics.set_status(ready(1, "cuda:0", 64, "torch"))
    metrics.set_status(GroupStatus(2, GroupState.RECOVERING))
    metrics.set_status(ready(2, "cpu", 32, "avx2"))
    (engine,) = lines_of(metrics, "engine_info")
    assert 'device="cpu",dtype="bfloat16",kernels="avx2",quantization="int8",tensor_parallel_size="2"' in engine
    (cache,) = lines_of(metrics, "cache_config_info")
    assert 'block_size="32",enable_prefix_caching="true",num_gpu_blocks="32"' in cache


@pytest.mark.parametrize(
    ("seconds", "waiting", "bandwidth"),
    [(2.0, None, 500.0), (2.0, 1.5, 2000.0), (2.0, 2.0, None), (0.0, None, None)],
)
def test_bus_bandwidth_is_that_of_the_time_without_waiting(
    seconds: float, waiting: float | None, bandwidth: float | None
) -> None:
    metrics = Metrics()
    metrics.add_report(report(seconds, waiting, 1000))
    labels = {"operation": "all_reduce", "rank": "3", "backend": "gloo"}
    name = "ryzanstein_collective_bus_bandwidth_bytes_per_second"
    assert value_of(metrics, name, **labels) == bandwidth
    assert value_of(metrics, "ryzanstein_collective_bytes_total", **labels) == 1000


def test_the_bandwidth_of_the_last_report_with_a_transfer_stays() -> None:
    metrics = Metrics()
    metrics.add_report(report(1.0, None, 1000))
    metrics.add_report(report(0.0, None, 0))
    (line,) = lines_of(metrics, "collective_bus_bandwidth_bytes_per_second")
    assert line.endswith(" 1000.0")


@pytest.mark.parametrize("state", [GroupState.RECOVERING, GroupState.FAILED])
def test_of_ranks_that_are_gone_only_what_they_have_done_is_shown(state: GroupState) -> None:
    present = ("rank_memory_bytes", "rank_weights_resident_ratio", "collective_bus_bandwidth_bytes_per_second")
    metrics = Metrics()
    metrics.set_status(ready(1, "cpu", 64, "avx2"))
    stats = report(1.0, None, 1000)
    stats.ranks[0].memory["resident"] = 5
    metrics.add_report(stats)
    assert [len(lines_of(metrics, name)) for name in present] == [1, 1, 1]
    metrics.set_status(GroupStatus(2, state))
    assert [len(lines_of(metrics, name)) for name in present] == [0, 0, 0]
    assert len(lines_of(metrics, "collective_bytes_total")) == 1
    metrics.add_report(stats)
    assert [len(lines_of(metrics, name)) for name in present] == [1, 1, 1]


def test_no_blocks_are_used_while_there_is_no_group() -> None:
    metrics = Metrics()
    metrics.set_status(ready(1, "cpu", 64, "avx2"))
    metrics.add_report(report(1.0, None, 0))
    assert (
        value_of(metrics, "ryzanstein_kv_cache_used_blocks")
        == SCHEDULER.num_kv_blocks - SCHEDULER.num_free_kv_blocks
        > 0
    )
    metrics.set_status(GroupStatus(2, GroupState.RECOVERING, num_kv_blocks=64))
    assert value_of(metrics, "ryzanstein_kv_cache_blocks") == 64
    assert (
        value_of(metrics, "ryzanstein_kv_cache_used_blocks") == value_of(metrics, "ryzanstein_kv_cache_usage_perc") == 0
    )


def test_a_line_of_another_kind_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="ryzanstein_engine_ready is a gauge"):
        Metrics()._counter("ryzanstein_engine_ready")
