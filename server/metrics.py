"""What /metrics shows. Names are vLLM's behind the prefix `ryzanstein_`.

Latencies are measured where a token reaches this process; statistics of the engine arrive as deltas and are added up
here, so that the counters outlive a rank.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.protocol.messages import (
    FinishReason,
    GroupState,
    GroupStatus,
    HistogramDelta,
    RankStats,
    SchedulerStats,
    StatsReport,
)
from engine.protocol.stats import TIME_BUCKETS

FIRST_TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
INTER_TOKEN_BUCKETS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
QUEUE_BUCKETS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 120.0, 600.0,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0,
)  # fmt: skip
RECOVERY_BUCKETS = (
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
ABORT = "abort"  # beside the engine's own reasons
FIRST_TOKEN = "first_token"  # beside the orchestrator's own phases
RECOVERY_KINDS = ("died", "hung", "failed", "orchestrator", "link")
RECOVERY_PHASES = ("kill", "respawn", "load", FIRST_TOKEN)
QUEUE_FULL, RATE_LIMITED, CONCURRENCY_LIMITED = "queue_full", "rate_limit_exceeded", "concurrency_limit_exceeded"
REJECTIONS = (QUEUE_FULL, RATE_LIMITED, CONCURRENCY_LIMITED)  # also the codes of the errors
FINISH_REASONS = (*(reason.value for reason in FinishReason), ABORT)


class _CollectiveTimes(Collector):
    """One histogram for each operation and rank, added up from deltas."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._text = text
        self._counts: dict[tuple[str, int], list[int]] = {}
        self._sums: dict[tuple[str, int], float] = {}

    def add(self, operation: str, rank: int, delta: HistogramDelta) -> None:
        key = operation, rank
        counts = self._counts.setdefault(key, [0] * (len(TIME_BUCKETS) + 1))
        self._counts[key] = [old + new for old, new in zip(counts, delta.counts, strict=True)]
        self._sums[key] = self._sums.get(key, 0.0) + delta.sum

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=("operation", "rank"))
        bounds = [*(str(float(bound)) for bound in TIME_BUCKETS), "+Inf"]
        for (operation, rank), counts in sorted(self._counts.items()):
            cumulative, total = [], 0
            for bound, count in zip(bounds, counts, strict=True):
                total += count
                cumulative.append((bound, float(total)))
            family.add_metric((operation, str(rank)), cumulative, self._sums[operation, rank])
        yield family


class Metrics:
    """All metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._collectives = _CollectiveTimes("ryzanstein_collective_seconds", "Time of one collective operation.")
        self._collective_waiting = _CollectiveTimes(
            "ryzanstein_collective_waiting_seconds",
            "Of the time of one collective operation, the waiting for slower ranks; known of ranks that share memory.",
        )
        self.registry.register(self._collectives)
        self.registry.register(self._collective_waiting)
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds",
            "From a request's arrival, before its text is tokenized, to a sequence's first token.",
            FIRST_TOKEN_BUCKETS,
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a sequence.", INTER_TOKEN_BUCKETS
        )
        self.e2e_latency = self._histogram(
            "e2e_request_latency_seconds",
            "From a request's arrival, before its text is tokenized, to the end of a sequence by stop or length.",
            REQUEST_BUCKETS,
        )
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "From arrival at the engine to the first step.", QUEUE_BUCKETS
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that the engine has begun.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.finished = Counter(
            "ryzanstein_request_success",
            f"Sequences that ended, by reason: {', '.join(FINISH_REASONS)}.",
            ("finished_reason",),
            registry=self.registry,
        )
        for reason in FINISH_REASONS:  # a rate needs the zero before the first end
            self.finished.labels(reason)
        self.admission_time = self._histogram(
            "request_admission_time_seconds", "A prompt's wait in the server, before the engine's.", QUEUE_BUCKETS
        )
        self.queued_requests = self._gauge("queued_requests", "Requests that wait in the server's queue.")
        self.queued_tokens = self._gauge("queued_tokens", "Prompt tokens of those.")
        self.rejected = self._labelled(
            "requests_rejected", f"Requests answered with 429, by reason: {', '.join(REJECTIONS)}.", "reason"
        )
        for reason in REJECTIONS:
            self.rejected.labels(reason)
        self.timed_out = self._counter("requests_timed_out", "Requests that their deadline ended.")
        self.key_requests = self._labelled("key_requests", "Accepted requests, by the API key's name.", "key")
        self.key_prompt_tokens = self._labelled("key_prompt_tokens", "Prompt tokens of those.", "key")
        self.key_generation_tokens = self._labelled("key_generation_tokens", "Tokens generated for those.", "key")
        self.slow_clients = self._counter(
            "slow_client_disconnects", "Connections closed since their client took nothing for --slow-client-timeout."
        )
        self.stream_resumptions = self._counter("stream_resumptions", "Times that a client came back to its stream.")
        self.streams_kept = self._gauge("streams_kept", "Streams that no client reads, and that one may come back to.")
        self.streams_kept_bytes = self._gauge(
            "streams_kept_bytes", "About the memory of these, and of the streams that are read."
        )
        self._preemptions = self._counter("num_preemptions", "Sequences whose KV blocks were taken away for others.")
        self._steps = self._counter("engine_steps", "Steps of the engine.")
        self._checks = self._counter("integrity_checks", "Times the idle engine found its block bookkeeping whole.")
        self._cache_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the KV cache.")
        self._cache_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the KV cache.")
        self._running = self._gauge("num_requests_running", "Sequences that take part in steps.")
        self._waiting = self._gauge("num_requests_waiting", "Sequences that wait for KV blocks or a place.")
        self._blocks = self._gauge("kv_cache_blocks", "KV blocks of each rank.")
        self._free_blocks = self._gauge("kv_cache_free_blocks", "KV blocks that no sequence uses.")
        self._used_blocks = self._gauge("kv_cache_used_blocks", "KV blocks that sequences use.")
        self._usage = self._gauge("kv_cache_usage_perc", "Share of the KV blocks in use; 1 is all.")
        self._ready = self._gauge("engine_ready", "1 while the engine takes requests.")
        self._epoch = self._gauge("engine_epoch", "Epoch of the rank group; each restart begins a new one.")
        self._state = Gauge(
            "ryzanstein_engine_state",
            f"1 for the state that the rank group is in: {', '.join(GroupState)}.",
            ("state",),
            registry=self.registry,
        )
        self.recoveries = Counter(
            "ryzanstein_recoveries",
            f"Rank groups that were lost after the first start began, by cause: {', '.join(RECOVERY_KINDS)}.",
            ("cause",),
            registry=self.registry,
        )
        for kind in RECOVERY_KINDS:
            self.recoveries.labels(kind)
        self.recovery_seconds = Histogram(
            "ryzanstein_recovery_seconds",
            f"Time that a recovery took, by phase: {', '.join(RECOVERY_PHASES)}; the last since the ranks were ready.",
            ("phase",),
            buckets=RECOVERY_BUCKETS,
            registry=self.registry,
        )
        for phase in RECOVERY_PHASES:
            self.recovery_seconds.labels(phase)
        self._weights_loaded = self._gauge(
            "weights_loaded_ratio", "Share of the weights that has been loaded; 1 once the engine is ready."
        )
        self._rank_memory = Gauge(
            "ryzanstein_rank_memory_bytes", "Memory of one rank.", ("rank", "kind"), registry=self.registry
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"ryzanstein_{name}", text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"ryzanstein_{name}", text, registry=self.registry)

    def _labelled(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"ryzanstein_{name}", text, (label,), registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"ryzanstein_{name}", text, registry=self.registry)

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
            self._collectives.add(operation, stats.rank, delta)
        for operation, delta in stats.waiting.items():
            self._collective_waiting.add(operation, stats.rank, delta)


def _loaded_ratio(status: GroupStatus) -> float:
    """Return the share of the weights that the group of `status` has loaded; 0 while nobody knows."""
    if status.state is GroupState.READY:
        return 1.0
    return status.loaded_bytes / status.total_bytes if status.total_bytes else 0.0
