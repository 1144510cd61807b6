"""What /metrics shows: the lines of `server.metrics.table`, counted.

Latencies are measured where a token reaches this process; statistics of the engine arrive as deltas and are added up
here, so that the counters outlive a rank.
"""

from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from itertools import product

from engine.protocol.config import EngineConfig
from engine.protocol.messages import GroupState, GroupStatus, RankStats, SchedulerStats, StatsReport
from engine.protocol.stats import bus_factor
from server.metrics import exposition
from server.metrics.exposition import Shown
from server.metrics.process import watch_process
from server.metrics.series import Distribution, Family, S_co, Series, Value
from server.metrics.table import BY_NAME, METRICS, MODEL_NAME, PREFIX, Kind, Metric
from server.metrics.vllm import under_vllm_names

VERSION = version("ryzanstein")


class Metrics:
    """All metrics of one server.

    Args:
        model_name: the model's name in the API.
        engine: its options, which are shown.
        dtype: type of weights and arithmetic.
        keys: names of the API keys that there are.
        vllm_names: whether they are served under vLLM's names, too.
    """

    def __init__(
        self,
        model_name: str = "",
        engine: EngineConfig | None = None,
        dtype: str = "float32",
        *,
        keys: Iterable[str] = (),
        vllm_names: bool = False,
    ) -> None:
        self._families: dict[str, Family[Series]] = {}  # by name
        self._engine = engine or EngineConfig()
        self._dtype = dtype
        self._num_waiting = 0  # in the engine
        self.num_unsent: Callable[[], int] = lambda: 0  # sequences that wait to be sent to an engine
        self.time_to_first_token = self._histogram("ryzanstein_time_to_first_token_seconds")
        self.inter_token_latency = self._histogram("ryzanstein_inter_token_latency_seconds")
        self.e2e_latency = self._histogram("ryzanstein_e2e_request_latency_seconds")
        self.admission_time = self._histogram("ryzanstein_request_admission_time_seconds")
        self.queue_time = self._histogram("ryzanstein_request_queue_time_seconds")
        self.wait_time = self._histogram("ryzanstein_request_wait_time_seconds")
        self.prefill_time = self._histogram("ryzanstein_request_prefill_time_seconds")
        self.decode_time = self._histogram("ryzanstein_request_decode_time_seconds")
        self.time_per_output_token = self._histogram("ryzanstein_request_time_per_output_token_seconds")
        self.prompt_tokens = self._counter("ryzanstein_prompt_tokens_total")
        self.generation_tokens = self._counter("ryzanstein_generation_tokens_total")
        self.prompt_lengths = self._histogram("ryzanstein_request_prompt_tokens")
        self.generation_lengths = self._histogram("ryzanstein_request_generation_tokens")
        self.finished = self._values("ryzanstein_request_success_total")
        self.key_requests = self._values("ryzanstein_key_requests_total")
        self.key_prompt_tokens = self._values("ryzanstein_key_prompt_tokens_total")
        self.key_generation_tokens = self._values("ryzanstein_key_generation_tokens_total")
        for name, family in product(keys, (self.key_requests, self.key_prompt_tokens, self.key_generation_tokens)):
            family.labels(name)
        self._running = self._gauge("ryzanstein_num_requests_running")
        self._gauge("ryzanstein_num_requests_waiting").set_function(lambda: self._num_waiting + self.num_unsent())
        self.queued_requests = self._gauge("ryzanstein_queued_requests")
        self.queued_tokens = self._gauge("ryzanstein_queued_tokens")
        self.rejected = self._values("ryzanstein_requests_rejected_total")
        self.timed_out = self._counter("ryzanstein_requests_timed_out_total")
        self._usage = self._gauge("ryzanstein_kv_cache_usage_perc")
        self._blocks = self._gauge("ryzanstein_kv_cache_blocks")
        self._used_blocks = self._gauge("ryzanstein_kv_cache_used_blocks")
        self._free_blocks = self._gauge("ryzanstein_kv_cache_free_blocks")
        self._cache_queries = self._counter("ryzanstein_prefix_cache_queries_total")
        self._cache_hits = self._counter("ryzanstein_prefix_cache_hits_total")
        self._preemptions = self._counter("ryzanstein_num_preemptions_total")
        self._cache_config = self._values("ryzanstein_cache_config_info")
        self._ready = self._gauge("ryzanstein_engine_ready")
        self.draining = self._gauge("ryzanstein_draining")
        self._state = self._values("ryzanstein_engine_state")
        self._epoch = self._gauge("ryzanstein_engine_epoch")
        self._engine_info = self._values("ryzanstein_engine_info")
        self._weights_loaded = self._gauge("ryzanstein_weights_loaded_ratio")
        self._steps = self._counter("ryzanstein_engine_steps_total")
        self._step_sequences = self._histogram("ryzanstein_step_sequences")
        self._step_tokens = self._histogram("ryzanstein_step_tokens")
        self._checks = self._counter("ryzanstein_integrity_checks_total")
        self.recoveries = self._values("ryzanstein_recoveries_total")
        self.recovery_seconds = self._distributions("ryzanstein_recovery_seconds")
        self._phases = self._distributions("ryzanstein_step_phase_seconds")
        self._skew = self._histogram("ryzanstein_rank_skew_seconds")
        self._collectives = self._distributions("ryzanstein_collective_seconds")
        self._collective_waiting = self._distributions("ryzanstein_collective_waiting_seconds")
        self._collective_bytes = self._values("ryzanstein_collective_bytes_total")
        self._bus_bandwidth = self._values("ryzanstein_collective_bus_bandwidth_bytes_per_second")
        self._rank_memory = self._values("ryzanstein_rank_memory_bytes")
        self._weights_resident = self._values("ryzanstein_rank_weights_resident_ratio")
        self.slow_clients = self._counter("ryzanstein_slow_client_disconnects_total")
        self.stream_resumptions = self._counter("ryzanstein_stream_resumptions_total")
        self.streams_kept = self._gauge("ryzanstein_streams_kept")
        self.streams_kept_bytes = self._gauge("ryzanstein_streams_kept_bytes")
        self.http_responses = self._values("ryzanstein_http_responses_total")
        self.http_in_progress = self._gauge("ryzanstein_http_requests_in_progress")
        watch_process(self._values)
        labels = {MODEL_NAME.name: model_name}
        self._shown = [
            Shown(self._families[line.name], line.name, labels if line.name.startswith(PREFIX) else {})
            for line in METRICS
        ]
        if vllm_names:
            self._shown += under_vllm_names(self._families, labels)

    def _values(self, name: str) -> Family[Value]:
        return self._add(Family(_line(name, Kind.COUNTER, Kind.GAUGE, Kind.INFO), Value))

    def _distributions(self, name: str) -> Family[Distribution]:
        line = _line(name, Kind.HISTOGRAM)
        return self._add(Family(line, partial(Distribution, line.buckets)))

    def _counter(self, name: str) -> Value:
        return self._add(Family(_line(name, Kind.COUNTER), Value)).labels()

    def _gauge(self, name: str) -> Value:
        return self._add(Family(_line(name, Kind.GAUGE), Value)).labels()

    def _histogram(self, name: str) -> Distribution:
        return self._distributions(name).labels()

    def _add(self, family: Family[S_co]) -> Family[S_co]:
        self._families[family.metric.name] = family
        return family

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return the exposition and its content type, in the format that the `Accept` header asks for."""
        return exposition.write(self._shown, accept)

    def set_status(self, status: GroupStatus) -> None:
        """Take over the rank group's state."""
        ready = status.state is GroupState.READY
        self._ready.set(float(ready))
        self._epoch.set(status.epoch)
        for state in GroupState:
            self._state.labels(state.value).set(float(state is status.state))
        if status.state is not GroupState.FAILED:
            self._weights_loaded.set(_loaded_ratio(status))
        self._set_blocks(status.num_kv_blocks, status.num_kv_blocks)  # what used them, if anything did, is gone
        if ready:
            self._describe(status)
        else:
            self._forget_group()

    def _describe(self, status: GroupStatus) -> None:
        """Show what the group that is ready is, instead of the one before it."""
        engine = self._engine
        device = status.ranks[0].device.partition(":")[0] if status.ranks else ""
        info = VERSION, str(engine.tensor_parallel_size), device, self._dtype, engine.quantization, status.kernels
        cache = str(engine.block_size), str(status.num_kv_blocks), str(engine.enable_prefix_caching).lower()
        for family, labels in ((self._engine_info, info), (self._cache_config, cache)):
            family.clear()
            family.labels(*labels).set(1)

    def _forget_group(self) -> None:
        """Show nothing any more of the present of ranks that are gone; what counts up stays."""
        self._running.set(0)
        self._num_waiting = 0
        for family in (self._rank_memory, self._weights_resident, self._bus_bandwidth):
            family.clear()

    def add_report(self, report: StatsReport) -> None:
        """Add the engine's statistics."""
        self._add_scheduler(report.scheduler)
        for rank in report.ranks:
            self._add_rank(rank)
        if report.rank_skew is not None:
            self._skew.add(report.rank_skew)

    def _add_scheduler(self, stats: SchedulerStats) -> None:
        self._running.set(stats.num_running)
        self._num_waiting = stats.num_waiting
        self._set_blocks(stats.num_kv_blocks, stats.num_free_kv_blocks)
        self._preemptions.inc(stats.preemptions)
        self._steps.inc(stats.steps)
        self._checks.inc(stats.integrity_checks)
        self._cache_queries.inc(stats.prefix_cache_queries)
        self._cache_hits.inc(stats.prefix_cache_hits)
        if stats.batch_sizes is not None:
            self._step_sequences.add(stats.batch_sizes)
        if stats.step_tokens is not None:
            self._step_tokens.add(stats.step_tokens)

    def _set_blocks(self, total: int, free: int) -> None:
        self._blocks.set(total)
        self._free_blocks.set(free)
        self._used_blocks.set(total - free)
        self._usage.set((total - free) / total if total else 0.0)

    def _add_rank(self, stats: RankStats) -> None:
        rank = str(stats.rank)
        for kind, size in stats.memory.items():
            self._rank_memory.labels(rank, kind).set(size)
        self._weights_resident.labels(rank).set(stats.weights_resident_ratio)
        for phase, delta in stats.phases.items():
            self._phases.labels(rank, phase).add(delta)
        for operation, delta in stats.collectives.items():
            self._collectives.labels(operation, rank, stats.backend).add(delta)
        for operation, delta in stats.waiting.items():
            self._collective_waiting.labels(operation, rank, stats.backend).add(delta)
        for operation, num_bytes in stats.collective_bytes.items():
            self._collective_bytes.labels(operation, rank, stats.backend).inc(num_bytes)
            if bandwidth := _bus_bandwidth(stats, operation):
                self._bus_bandwidth.labels(operation, rank, stats.backend).set(bandwidth)


def _loaded_ratio(status: GroupStatus) -> float:
    """Return the share of the weights that the group of `status` has loaded; 0 while nobody knows."""
    if status.state is GroupState.READY:
        return 1.0
    return status.loaded_bytes / status.total_bytes if status.total_bytes else 0.0


def _bus_bandwidth(stats: RankStats, operation: str) -> float:
    """Return the bytes a second of what was transferred since the last report; 0 where there was nothing."""
    seconds = stats.collectives[operation].sum if operation in stats.collectives else 0.0
    if operation in stats.waiting:
        seconds -= stats.waiting[operation].sum
    transferred = stats.collective_bytes[operation] * bus_factor(operation, stats.world_size)
    return transferred / seconds if seconds > 0 else 0.0


def _line(name: str, *kinds: Kind) -> Metric:
    metric = BY_NAME[name]
    if metric.kind not in kinds:
        raise TypeError(f"{name} is a {metric.kind} in the table")
    return metric
