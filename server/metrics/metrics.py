"""What /metrics shows: the lines of `server.metrics.table`, counted.

Latencies are measured where a token reaches this process; statistics of the engine arrive as deltas and are added up
here, so that the counters outlive a rank.
"""

import itertools
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from engine.protocol.messages import GroupState, GroupStatus, HistogramDelta, RankStats, SchedulerStats, StatsReport
from server.metrics.table import BY_NAME, Kind, Metric


class DeltaHistogram(Collector):
    """A histogram that is measured elsewhere and added up here from deltas."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}

    def add(self, labels: tuple[str, ...], delta: HistogramDelta) -> None:
        """Add what was observed; `labels` are the labels' values in the table's order."""
        counts = self._counts.setdefault(labels, [0] * (len(self._metric.buckets) + 1))
        self._counts[labels] = [old + new for old, new in zip(counts, delta.counts, strict=True)]
        self._sums[labels] = self._sums.get(labels, 0.0) + delta.sum

    def collect(self) -> Iterator[Family]:
        """Return the histogram's samples."""
        metric = self._metric
        family = HistogramMetricFamily(metric.name, metric.help, labels=[label.name for label in metric.labels])
        bounds = [*(str(float(bound)) for bound in metric.buckets), "+Inf"]
        for labels, counts in sorted(self._counts.items()):
            cumulative, total = [], 0
            for bound, count in zip(bounds, counts, strict=True):
                total += count
                cumulative.append((bound, float(total)))
            family.add_metric(labels, cumulative, self._sums[labels])
        yield family


class Metrics:
    """All metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.time_to_first_token = self._histogram("ryzanstein_time_to_first_token_seconds")
        self.inter_token_latency = self._histogram("ryzanstein_inter_token_latency_seconds")
        self.e2e_latency = self._histogram("ryzanstein_e2e_request_latency_seconds")
        self.admission_time = self._histogram("ryzanstein_request_admission_time_seconds")
        self.queue_time = self._histogram("ryzanstein_request_queue_time_seconds")
        self.prompt_tokens = self._counter("ryzanstein_prompt_tokens_total")
        self.generation_tokens = self._counter("ryzanstein_generation_tokens_total")
        self.finished = self._counter("ryzanstein_request_success_total")
        self.key_requests = self._counter("ryzanstein_key_requests_total")
        self.key_prompt_tokens = self._counter("ryzanstein_key_prompt_tokens_total")
        self.key_generation_tokens = self._counter("ryzanstein_key_generation_tokens_total")
        self.queued_requests = self._gauge("ryzanstein_queued_requests")
        self.queued_tokens = self._gauge("ryzanstein_queued_tokens")
        self.rejected = self._counter("ryzanstein_requests_rejected_total")
        self.timed_out = self._counter("ryzanstein_requests_timed_out_total")
        self.slow_clients = self._counter("ryzanstein_slow_client_disconnects_total")
        self.stream_resumptions = self._counter("ryzanstein_stream_resumptions_total")
        self.streams_kept = self._gauge("ryzanstein_streams_kept")
        self.streams_kept_bytes = self._gauge("ryzanstein_streams_kept_bytes")
        self.recoveries = self._counter("ryzanstein_recoveries_total")
        self.recovery_seconds = self._histogram("ryzanstein_recovery_seconds")
        self._running = self._gauge("ryzanstein_num_requests_running")
        self._waiting = self._gauge("ryzanstein_num_requests_waiting")
        self._usage = self._gauge("ryzanstein_kv_cache_usage_perc")
        self._blocks = self._gauge("ryzanstein_kv_cache_blocks")
        self._used_blocks = self._gauge("ryzanstein_kv_cache_used_blocks")
        self._free_blocks = self._gauge("ryzanstein_kv_cache_free_blocks")
        self._cache_queries = self._counter("ryzanstein_prefix_cache_queries_total")
        self._cache_hits = self._counter("ryzanstein_prefix_cache_hits_total")
        self._preemptions = self._counter("ryzanstein_num_preemptions_total")
        self._ready = self._gauge("ryzanstein_engine_ready")
        self._state = self._gauge("ryzanstein_engine_state")
        self._epoch = self._gauge("ryzanstein_engine_epoch")
        self._weights_loaded = self._gauge("ryzanstein_weights_loaded_ratio")
        self._steps = self._counter("ryzanstein_engine_steps_total")
        self._checks = self._counter("ryzanstein_integrity_checks_total")
        self._collectives = self._delta_histogram("ryzanstein_collective_seconds")
        self._collective_waiting = self._delta_histogram("ryzanstein_collective_waiting_seconds")
        self._rank_memory = self._gauge("ryzanstein_rank_memory_bytes")

    def _histogram(self, name: str) -> Histogram:
        metric = _line(name, Kind.HISTOGRAM)
        histogram = Histogram(name, metric.help, _label_names(metric), buckets=metric.buckets, registry=self.registry)
        for values in _fixed_values(metric):
            histogram.labels(*values)
        return histogram

    def _counter(self, name: str) -> Counter:
        metric = _line(name, Kind.COUNTER)
        counter = Counter(name, metric.help, _label_names(metric), registry=self.registry)
        for values in _fixed_values(metric):
            counter.labels(*values)
        return counter

    def _gauge(self, name: str) -> Gauge:
        metric = _line(name, Kind.GAUGE)
        gauge = Gauge(name, metric.help, _label_names(metric), registry=self.registry)
        for values in _fixed_values(metric):
            gauge.labels(*values)
        return gauge

    def _delta_histogram(self, name: str) -> DeltaHistogram:
        histogram = DeltaHistogram(_line(name, Kind.HISTOGRAM))
        self.registry.register(histogram)
        return histogram

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return the exposition and its content type, in the format that the `Accept` header asks for."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type

    def set_status(self, status: GroupStatus) -> None:
        """Take over the rank group's state."""
        ready = status.state is GroupState.READY
        self._ready.set(ready)
        self._epoch.set(status.epoch)
        for state in GroupState:
            self._state.labels(state.value).set(state is status.state)
        if status.state is not GroupState.FAILED:
            self._weights_loaded.set(_loaded_ratio(status))
        if ready:
            self._set_blocks(status.num_kv_blocks, status.num_kv_blocks)
        else:
            self._running.set(0)
            self._waiting.set(0)

    def add_report(self, report: StatsReport) -> None:
        """Add the engine's statistics."""
        self._add_scheduler(report.scheduler)
        for rank in report.ranks:
            self._add_rank(rank)

    def _add_scheduler(self, stats: SchedulerStats) -> None:
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._set_blocks(stats.num_kv_blocks, stats.num_free_kv_blocks)
        self._preemptions.inc(stats.preemptions)
        self._steps.inc(stats.steps)
        self._checks.inc(stats.integrity_checks)
        self._cache_queries.inc(stats.prefix_cache_queries)
        self._cache_hits.inc(stats.prefix_cache_hits)

    def _set_blocks(self, total: int, free: int) -> None:
        self._blocks.set(total)
        self._free_blocks.set(free)
        self._used_blocks.set(total - free)
        self._usage.set((total - free) / total if total else 0.0)

    def _add_rank(self, stats: RankStats) -> None:
        for kind, size in stats.memory.items():
            self._rank_memory.labels(rank=str(stats.rank), kind=kind).set(size)
        for operation, delta in stats.collectives.items():
            self._collectives.add((operation, str(stats.rank)), delta)
        for operation, delta in stats.waiting.items():
            self._collective_waiting.add((operation, str(stats.rank)), delta)


def _loaded_ratio(status: GroupStatus) -> float:
    """Return the share of the weights that the group of `status` has loaded; 0 while nobody knows."""
    if status.state is GroupState.READY:
        return 1.0
    return status.loaded_bytes / status.total_bytes if status.total_bytes else 0.0


def _line(name: str, kind: Kind) -> Metric:
    metric = BY_NAME[name]
    if metric.kind is not kind:
        raise TypeError(f"{name} is a {metric.kind} in the table, not a {kind}")
    return metric


def _label_names(metric: Metric) -> list[str]:
    return [label.name for label in metric.labels]


def _fixed_values(metric: Metric) -> Iterator[tuple[str, ...]]:
    """Return the labels' values of all series of `metric` if these are known beforehand."""
    if metric.labels:
        yield from itertools.product(*(label.values for label in metric.labels))
