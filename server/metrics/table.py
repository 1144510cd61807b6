"""The table of all metrics: what each is called, counts, means and looks like.

One line (`Metric`) defines one metric; everything else that knows metrics is derived from it.

- `/metrics`: `server.metrics.metrics` makes the series of each line. Every series whose name begins with `PREFIX` has
  the label `MODEL_NAME` beside its own. Where all values of a line's labels are fixed, its series exist from the start,
  because a rate needs the zero before the first event.
- docs/metrics.md (`python -m server.metrics.page`): a heading for each `Group`, in the order of the enumeration, under
  it its lines in the order of `METRICS`, with the help as their text.
- The dashboard: a row for each `Group`, in it a panel for each `Panel.title`. Lines of one group whose panels have the
  same title are drawn in one. What is drawn follows from `Panel.show` (see `Show`), the axis' unit from `Metric.unit`.
  Quantiles and rates of a histogram are those of `NAME_bucket`, `NAME_sum` and `NAME_count`; counters are named as they
  are served, with `_total`. A line without a panel is on no dashboard.
- Aliases (`--vllm-metric-names`): a line is also served under each of its `vllm` names, with the same labels and vLLM's
  `engine="0"`. Gauges that have one of these names in common are added up there. `VLLM_METRICS` has no name of ours.

Names begin with `PREFIX` and end in their unit where that is one of physics (`_seconds`, `_bytes`, `_ratio`), counters
in `_total` after it. They are vLLM's behind another prefix wherever the meaning is the same, which explains the one
exception (`kv_cache_usage_perc`, a ratio). Of the server's process they are those of all Prometheus clients
(`process_…`).
"""

from dataclasses import dataclass
from enum import StrEnum

from engine.protocol.config import QUANTIZATIONS
from engine.protocol.messages import FinishReason, GroupState
from engine.protocol.stats import (
    BACKENDS,
    BATCH_SIZE_BUCKETS,
    MEMORY_KINDS,
    OPERATIONS,
    PHASES,
    STEP_BUCKETS,
    STEP_TOKENS_BUCKETS,
    TIME_BUCKETS,
)

PREFIX, VLLM_PREFIX = "ryzanstein_", "vllm:"

ABORT = "abort"  # beside the engine's own reasons
FINISH_REASONS = (*(reason.value for reason in FinishReason), ABORT)
QUEUE_FULL, RATE_LIMITED, CONCURRENCY_LIMITED = "queue_full", "rate_limit_exceeded", "concurrency_limit_exceeded"
REJECTIONS = (QUEUE_FULL, RATE_LIMITED, CONCURRENCY_LIMITED)  # also the codes of the errors
RECOVERY_KINDS = ("died", "hung", "failed", "orchestrator", "link")
FIRST_TOKEN = "first_token"  # beside the orchestrator's own phases
RECOVERY_PHASES = ("kill", "respawn", "load", FIRST_TOKEN)

METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
OTHER_METHOD, UNKNOWN_ROUTE = "other", "unknown"
USUAL_CODES = ("200", "400", "429", "500", "503", "504")  # of what generates: their first burst is to be seen, too

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


LENGTH_BUCKETS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000,
)  # fmt: skip


class Kind(StrEnum):
    """Prometheus' kinds of metrics."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    INFO = "info"  # a gauge that is always 1, whose labels say something


class Group(StrEnum):
    """Headings of the page and rows of the dashboard, in their order."""

    LATENCY = "Latency"
    TRAFFIC = "Tokens and requests"
    QUEUE = "Queues and refusals"
    KV_CACHE = "KV cache"
    ENGINE = "Engine and recovery"
    RANKS = "Ranks and collectives"
    STREAMS = "Streams"
    HTTP = "HTTP"
    PROCESS = "Process of the server"


class Show(StrEnum):
    """What a panel draws of a metric."""

    VALUE = "value"  # a gauge as it is
    RATE = "rate"  # a counter's increase a second, or that of a histogram's count
    INCREASE = "increase"  # a counter's increase over the range shown: of what is seldom
    QUANTILES = "quantiles"  # of a histogram: 0.5, 0.95 and 0.99
    MEAN = "mean"  # of a histogram: the rate of its sum by that of its count
    TIME_SHARE = "time share"  # of a histogram of seconds: the rate of its sum, 1 is all the time of an instance
    TABLE = "table"  # the labels of information
    QUOTIENT = "quotient"  # a counter's rate by the rate of the counter `Panel.over`, or a gauge by the gauge


@dataclass(frozen=True)
class Panel:
    """How a dashboard shows a metric.

    Args:
        title: of the panel; lines of one group with the same title share it.
        show: what is drawn.
        by: labels that tell the lines apart; over all others is aggregated.
        aggregate: PromQL's operator for that (sum, max, min, avg); rates are always summed up, and shares of the time
            those of instances averaged.
        over: QUOTIENT: the name of what is divided by.
    """

    title: str
    show: Show
    by: tuple[str, ...] = ()
    aggregate: str = "sum"
    over: str = ""


@dataclass(frozen=True)
class Label:
    """A label.

    Args:
        name: of the label.
        help: what it says.
        values: all that it has, where these are fixed; its series are there from the start.
        some: some of those that it may have.
    """

    name: str
    help: str
    values: tuple[str, ...] = ()
    some: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric:
    """One line of the table.

    Args:
        name: as it is served, for counters with `_total`.
        kind: of Prometheus.
        unit: of a sample: seconds, bytes, ratio (1 is all), or what is counted.
        help: one sentence or more.
        group: where it belongs.
        labels: all but the model's name.
        buckets: of a histogram: upper bounds in its unit; +Inf follows.
        panel: on the dashboard; none when it is not there.
        vllm: names of vLLM for the same.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    group: Group
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()
    panel: Panel | None = None
    vllm: tuple[str, ...] = ()


MODEL_NAME = Label("model_name", "the model's name in the API")

_RANK = Label("rank", "the rank's number")
_COLLECTIVE = (
    Label("operation", "the collective operation", some=OPERATIONS),
    _RANK,
    Label("backend", "what carries it", some=BACKENDS),
)
_KEY = Label("key", "the API key's name; anonymous: no key is asked for")

METRICS: tuple[Metric, ...] = (
    # --- latency -----------------------------------------------------------------------------------------------------
    Metric(
        "ryzanstein_time_to_first_token_seconds",
        Kind.HISTOGRAM,
        "seconds",
        "From a request's arrival, before its text is tokenized, to a sequence's first token.",
        Group.LATENCY,
        buckets=FIRST_TOKEN_BUCKETS,
        panel=Panel("Time to first token", Show.QUANTILES),
        vllm=("vllm:time_to_first_token_seconds",),
    ),
    Metric(
        "ryzanstein_inter_token_latency_seconds",
        Kind.HISTOGRAM,
        "seconds",
        "Between two tokens of a sequence.",
        Group.LATENCY,
        buckets=INTER_TOKEN_BUCKETS,
        panel=Panel("Between tokens", Show.QUANTILES),
        vllm=("vllm:inter_token_latency_seconds",),
    ),
    Metric(
        "ryzanstein_e2e_request_latency_seconds",
        Kind.HISTOGRAM,
        "seconds",
        "From a request's arrival, before its text is tokenized, to the end of a sequence by stop or length.",
        Group.LATENCY,
        buckets=REQUEST_BUCKETS,
        panel=Panel("Whole request", Show.QUANTILES),
        vllm=("vllm:e2e_request_latency_seconds",),
    ),
    Metric(
        "ryzanstein_request_admission_time_seconds",
        Kind.HISTOGRAM,
        "seconds",
        "A prompt's wait in the server, before the engine's.",
        Group.LATENCY,
        buckets=QUEUE_BUCKETS,
        panel=Panel("Wait in the server's queue", Show.QUANTILES),
    ),
    Metric(
        "ryzanstein_request_queue_time_seconds",
        Kind.HISTOGRAM,
        "seconds",
        "From arrival at the engine to the first step.",
        Group.LATENCY,
        buckets=QUEUE_BUCKETS,
        panel=Panel("Wait in the engine's queue", Show.QUANTILES),
    ),
    Metric(
        "ryzanstein_request_wait_time_seconds",
        Kind.HISTOGRAM,
        "seconds",
        "From a prompt's arrival in the server's queue to a sequence's first step: its wait in both queues.",
        Group.LATENCY,
        buckets=QUEUE_BUCKETS,
        vllm=("vllm:request_queue_time_seconds",),
    ),
    Metric(
        "ryzanstein_request_prefill_time_seconds",
        Kind.HISTOGRAM,
        "seconds",
        "From a sequence's first step to its first token.",
        Group.LATENCY,
        buckets=FIRST_TOKEN_BUCKETS,
        panel=Panel("Prefill", Show.QUANTILES),
        vllm=("vllm:request_prefill_time_seconds",),
    ),
    Metric(
        "ryzanstein_request_decode_time_seconds",
        Kind.HISTOGRAM,
        "seconds",
        "From a sequence's first token to its last, of those that ended by stop or length.",
        Group.LATENCY,
        buckets=REQUEST_BUCKETS,
        panel=Panel("Decode", Show.QUANTILES),
        vllm=("vllm:request_decode_time_seconds",),
    ),
    Metric(
        "ryzanstein_request_time_per_output_token_seconds",
        Kind.HISTOGRAM,
        "seconds",
        "A sequence's decode time by its tokens after the first, of those that ended by stop or length.",
        Group.LATENCY,
        buckets=INTER_TOKEN_BUCKETS,
        vllm=("vllm:request_time_per_output_token_seconds",),
    ),
    # --- tokens and requests -----------------------------------------------------------------------------------------
    Metric(
        "ryzanstein_prompt_tokens_total",
        Kind.COUNTER,
        "tokens",
        "Prompt tokens of requests that the engine has begun.",
        Group.TRAFFIC,
        panel=Panel("Tokens a second", Show.RATE),
        vllm=("vllm:prompt_tokens_total",),
    ),
    Metric(
        "ryzanstein_generation_tokens_total",
        Kind.COUNTER,
        "tokens",
        "Tokens generated.",
        Group.TRAFFIC,
        panel=Panel("Tokens a second", Show.RATE),
        vllm=("vllm:generation_tokens_total",),
    ),
    Metric(
        "ryzanstein_request_prompt_tokens",
        Kind.HISTOGRAM,
        "tokens",
        "Length of the prompts that the engine has begun.",
        Group.TRAFFIC,
        buckets=LENGTH_BUCKETS,
        panel=Panel("Length of prompts", Show.QUANTILES),
        vllm=("vllm:request_prompt_tokens",),
    ),
    Metric(
        "ryzanstein_request_generation_tokens",
        Kind.HISTOGRAM,
        "tokens",
        "Length of what was generated for sequences that ended by stop or length.",
        Group.TRAFFIC,
        buckets=LENGTH_BUCKETS,
        panel=Panel("Length of answers", Show.QUANTILES),
        vllm=("vllm:request_generation_tokens",),
    ),
    Metric(
        "ryzanstein_request_success_total",
        Kind.COUNTER,
        "sequences",
        "Sequences that ended, by reason; also those that ended without success.",
        Group.TRAFFIC,
        labels=(Label("finished_reason", "why it ended", FINISH_REASONS),),
        panel=Panel("Sequences that end, by reason", Show.RATE, by=("finished_reason",)),
        vllm=("vllm:request_success_total",),
    ),
    Metric(
        "ryzanstein_key_requests_total",
        Kind.COUNTER,
        "requests",
        "Accepted requests, by the API key's name.",
        Group.TRAFFIC,
        labels=(_KEY,),
        panel=Panel("Requests, by API key", Show.RATE, by=("key",)),
    ),
    Metric(
        "ryzanstein_key_prompt_tokens_total",
        Kind.COUNTER,
        "tokens",
        "Prompt tokens of accepted requests, by the API key's name.",
        Group.TRAFFIC,
        labels=(_KEY,),
        panel=Panel("Tokens a second, by API key", Show.RATE, by=("key",)),
    ),
    Metric(
        "ryzanstein_key_generation_tokens_total",
        Kind.COUNTER,
        "tokens",
        "Tokens generated, by the API key's name.",
        Group.TRAFFIC,
        labels=(_KEY,),
        panel=Panel("Tokens a second, by API key", Show.RATE, by=("key",)),
    ),
    # --- queues and refusals -----------------------------------------------------------------------------------------
    Metric(
        "ryzanstein_num_requests_running",
        Kind.GAUGE,
        "sequences",
        "Sequences that take part in steps.",
        Group.QUEUE,
        panel=Panel("Running and waiting", Show.VALUE),
        vllm=("vllm:num_requests_running",),
    ),
    Metric(
        "ryzanstein_num_requests_waiting",
        Kind.GAUGE,
        "sequences",
        "Sequences that wait in the engine for KV blocks or a place, or for an engine: those in flight while ranks are "
        "replaced.",
        Group.QUEUE,
        panel=Panel("Running and waiting", Show.VALUE),
        vllm=("vllm:num_requests_waiting",),
    ),
    Metric(
        "ryzanstein_queued_requests",
        Kind.GAUGE,
        "requests",
        "Requests that wait in the server's queue.",
        Group.QUEUE,
        panel=Panel("Running and waiting", Show.VALUE),
        vllm=("vllm:num_requests_waiting",),
    ),
    Metric(
        "ryzanstein_queued_tokens",
        Kind.GAUGE,
        "tokens",
        "Prompt tokens of the requests that wait in the server's queue.",
        Group.QUEUE,
        panel=Panel("Prompt tokens that wait", Show.VALUE),
    ),
    Metric(
        "ryzanstein_requests_rejected_total",
        Kind.COUNTER,
        "requests",
        "Requests answered with 429, by reason.",
        Group.QUEUE,
        labels=(Label("reason", "the error's code", REJECTIONS),),
        panel=Panel("Refused and given up", Show.RATE, by=("reason",)),
    ),
    Metric(
        "ryzanstein_requests_timed_out_total",
        Kind.COUNTER,
        "requests",
        "Requests that their deadline ended.",
        Group.QUEUE,
        panel=Panel("Refused and given up", Show.RATE),
    ),
    # --- KV cache ----------------------------------------------------------------------------------------------------
    Metric(
        "ryzanstein_kv_cache_usage_perc",
        Kind.GAUGE,
        "ratio",
        "Share of the KV blocks in use; 1 is all.",
        Group.KV_CACHE,
        panel=Panel("KV cache in use", Show.VALUE, aggregate="max"),
        vllm=("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    ),
    Metric(
        "ryzanstein_kv_cache_blocks",
        Kind.GAUGE,
        "blocks",
        "KV blocks of each rank.",
        Group.KV_CACHE,
        panel=Panel("KV blocks", Show.VALUE),
    ),
    Metric(
        "ryzanstein_kv_cache_used_blocks",
        Kind.GAUGE,
        "blocks",
        "KV blocks that sequences use.",
        Group.KV_CACHE,
        panel=Panel("KV blocks", Show.VALUE),
    ),
    Metric(
        "ryzanstein_kv_cache_free_blocks",
        Kind.GAUGE,
        "blocks",
        "KV blocks that no sequence uses.",
        Group.KV_CACHE,
        panel=Panel("KV blocks", Show.VALUE),
    ),
    Metric(
        "ryzanstein_prefix_cache_queries_total",
        Kind.COUNTER,
        "tokens",
        "Prompt tokens looked up in the KV cache.",
        Group.KV_CACHE,
        vllm=("vllm:prefix_cache_queries_total",),
    ),
    Metric(
        "ryzanstein_prefix_cache_hits_total",
        Kind.COUNTER,
        "tokens",
        "Prompt tokens found in the KV cache.",
        Group.KV_CACHE,
        panel=Panel("Prompt tokens found", Show.QUOTIENT, over="ryzanstein_prefix_cache_queries_total"),
        vllm=("vllm:prefix_cache_hits_total",),
    ),
    Metric(
        "ryzanstein_num_preemptions_total",
        Kind.COUNTER,
        "sequences",
        "Sequences whose KV blocks were taken away for others.",
        Group.KV_CACHE,
        panel=Panel("Preemptions", Show.RATE),
        vllm=("vllm:num_preemptions_total",),
    ),
    Metric(
        "ryzanstein_cache_config_info",
        Kind.INFO,
        "info",
        "How the KV cache is laid out; known once the engine is ready.",
        Group.KV_CACHE,
        labels=(
            Label("block_size", "tokens in a KV block"),
            Label("num_gpu_blocks", "KV blocks of each rank, whatever it computes on: the name is vLLM's"),
            Label("enable_prefix_caching", "whether prompts share them", some=("true", "false")),
        ),
        vllm=("vllm:cache_config_info",),
    ),
    # --- engine and recovery -----------------------------------------------------------------------------------------
    Metric(
        "ryzanstein_engine_ready",
        Kind.GAUGE,
        "engines",
        "1 while the engine takes requests; also while the service drains and takes none from clients.",
        Group.ENGINE,
        panel=Panel("Engines that take requests", Show.VALUE),
    ),
    Metric(
        "ryzanstein_draining",
        Kind.GAUGE,
        "servers",
        "1 while the service ends: what was accepted finishes, and new requests are refused.",
        Group.ENGINE,
        panel=Panel("Services that drain", Show.VALUE),
    ),
    Metric(
        "ryzanstein_engine_state",
        Kind.GAUGE,
        "engines",
        "1 for the state that the rank group is in.",
        Group.ENGINE,
        labels=(Label("state", "the state", tuple(GroupState)),),
        panel=Panel("State", Show.VALUE, by=("state",)),
    ),
    Metric(
        "ryzanstein_engine_epoch",
        Kind.GAUGE,
        "epochs",
        "Epoch of the rank group; each restart begins a new one.",
        Group.ENGINE,
    ),
    Metric(
        "ryzanstein_engine_info",
        Kind.INFO,
        "info",
        "What runs here; known once the engine is ready.",
        Group.ENGINE,
        labels=(
            Label("version", "of this program"),
            Label("tensor_parallel_size", "ranks that the model is split over"),
            Label("device", "what the ranks compute on", some=("cpu", "cuda")),
            Label("dtype", "type of weights and arithmetic", some=("float32", "bfloat16", "float16")),
            Label("quantization", "type of the matrices in memory", some=QUANTIZATIONS),
            Label("kernels", "what the ranks compute with"),
        ),
        panel=Panel("What runs", Show.TABLE),
    ),
    Metric(
        "ryzanstein_weights_loaded_ratio",
        Kind.GAUGE,
        "ratio",
        "Share of the weights that has been loaded; 1 once the engine is ready.",
        Group.ENGINE,
        panel=Panel("Weights loaded", Show.VALUE, aggregate="min"),
    ),
    Metric(
        "ryzanstein_engine_steps_total",
        Kind.COUNTER,
        "steps",
        "Steps of the engine.",
        Group.ENGINE,
        panel=Panel("Steps a second", Show.RATE),
    ),
    Metric(
        "ryzanstein_step_sequences",
        Kind.HISTOGRAM,
        "sequences",
        "Sequences that took part in a step.",
        Group.ENGINE,
        buckets=BATCH_SIZE_BUCKETS,
        panel=Panel("Sequences in a step", Show.QUANTILES),
    ),
    Metric(
        "ryzanstein_step_tokens",
        Kind.HISTOGRAM,
        "tokens",
        "Tokens computed in a step.",
        Group.ENGINE,
        buckets=STEP_TOKENS_BUCKETS,
        panel=Panel("Tokens in a step", Show.QUANTILES),
    ),
    Metric(
        "ryzanstein_integrity_checks_total",
        Kind.COUNTER,
        "checks",
        "Times the idle engine found its block bookkeeping whole.",
        Group.ENGINE,
    ),
    Metric(
        "ryzanstein_recoveries_total",
        Kind.COUNTER,
        "recoveries",
        "Rank groups that were lost after the first start began, by cause.",
        Group.ENGINE,
        labels=(Label("cause", "what was lost, or how", RECOVERY_KINDS),),
        panel=Panel("Recoveries", Show.INCREASE, by=("cause",)),
    ),
    Metric(
        "ryzanstein_recovery_seconds",
        Kind.HISTOGRAM,
        "seconds",
        "Time that a recovery took, by phase; the last one runs since the ranks were ready.",
        Group.ENGINE,
        labels=(Label("phase", "the phase, in this order", RECOVERY_PHASES),),
        buckets=RECOVERY_BUCKETS,
        panel=Panel("Time of a recovery, by phase", Show.MEAN, by=("phase",)),
    ),
    # --- ranks and collectives ---------------------------------------------------------------------------------------
    Metric(
        "ryzanstein_step_phase_seconds",
        Kind.HISTOGRAM,
        "seconds",
        "Time of a step, by rank and phase. Communicating includes waiting for slower ranks.",
        Group.RANKS,
        labels=(_RANK, Label("phase", "the phase, in this order; ranks but the first have two", some=PHASES)),
        buckets=STEP_BUCKETS,
        panel=Panel("Where the time goes, by rank and phase", Show.TIME_SHARE, by=("rank", "phase")),
    ),
    Metric(
        "ryzanstein_rank_skew_seconds",
        Kind.HISTOGRAM,
        "seconds",
        "In a step, the slowest rank's time of computing less the fastest's.",
        Group.RANKS,
        buckets=STEP_BUCKETS,
        panel=Panel("How far ranks are apart in a step", Show.QUANTILES),
    ),
    Metric(
        "ryzanstein_collective_seconds",
        Kind.HISTOGRAM,
        "seconds",
        "Time of one collective operation.",
        Group.RANKS,
        labels=_COLLECTIVE,
        buckets=TIME_BUCKETS,
        panel=Panel("Share of the time in collectives", Show.TIME_SHARE, by=("operation", "rank")),
    ),
    Metric(
        "ryzanstein_collective_waiting_seconds",
        Kind.HISTOGRAM,
        "seconds",
        "Of the time of one collective operation, the waiting for slower ranks; known of ranks that share memory.",
        Group.RANKS,
        labels=_COLLECTIVE,
        buckets=TIME_BUCKETS,
        panel=Panel("Share of the time waiting for slower ranks", Show.TIME_SHARE, by=("operation", "rank")),
    ),
    Metric(
        "ryzanstein_collective_bytes_total",
        Kind.COUNTER,
        "bytes",
        "Bytes of collective operations, as nccl-tests counts them: of one rank for all_reduce and broadcast, of all "
        "ranks together for the others.",
        Group.RANKS,
        labels=_COLLECTIVE,
        panel=Panel("Bytes of collectives", Show.RATE, by=("operation", "rank")),
    ),
    Metric(
        "ryzanstein_collective_bus_bandwidth_bytes_per_second",
        Kind.GAUGE,
        "bytes_per_second",
        "Bus bandwidth of collective operations, by nccl-tests' definition, in the last second or so in which there "
        "were any; known while the engine is ready. Waiting for slower ranks is not part of the time where that is "
        "known.",
        Group.RANKS,
        labels=_COLLECTIVE,
        panel=Panel("Bus bandwidth", Show.VALUE, by=("operation", "rank"), aggregate="avg"),
    ),
    Metric(
        "ryzanstein_rank_memory_bytes",
        Kind.GAUGE,
        "bytes",
        "Memory of one rank, by kind; known while the engine is ready.",
        Group.RANKS,
        labels=(_RANK, Label("kind", "what lies there", some=MEMORY_KINDS)),
        panel=Panel("Memory, by rank and kind", Show.VALUE, by=("rank", "kind"), aggregate="avg"),
    ),
    Metric(
        "ryzanstein_rank_weights_resident_ratio",
        Kind.GAUGE,
        "ratio",
        "Of a rank's weights that are mapped files, the share that is in memory now; 1 where none are mapped. Known "
        "while the engine is ready.",
        Group.RANKS,
        labels=(_RANK,),
        panel=Panel("Mapped weights in memory", Show.VALUE, by=("rank",), aggregate="min"),
    ),
    # --- streams -----------------------------------------------------------------------------------------------------
    Metric(
        "ryzanstein_slow_client_disconnects_total",
        Kind.COUNTER,
        "connections",
        "Connections closed since their client took nothing for --slow-client-timeout.",
        Group.STREAMS,
        panel=Panel("Clients cut off, and come back", Show.RATE),
    ),
    Metric(
        "ryzanstein_stream_resumptions_total",
        Kind.COUNTER,
        "resumptions",
        "Times that a client came back to its stream.",
        Group.STREAMS,
        panel=Panel("Clients cut off, and come back", Show.RATE),
    ),
    Metric(
        "ryzanstein_streams_kept",
        Kind.GAUGE,
        "streams",
        "Streams that no client reads, and that one may come back to.",
        Group.STREAMS,
        panel=Panel("Streams kept", Show.VALUE),
    ),
    Metric(
        "ryzanstein_streams_kept_bytes",
        Kind.GAUGE,
        "bytes",
        "About the memory of the streams that are kept, and of those that are read.",
        Group.STREAMS,
        panel=Panel("Memory of streams", Show.VALUE),
    ),
    # --- HTTP --------------------------------------------------------------------------------------------------------
    Metric(
        "ryzanstein_http_responses_total",
        Kind.COUNTER,
        "responses",
        "Responses, refusals included, but not to what is not HTTP. Code 499: the client went away before one began.",
        Group.HTTP,
        labels=(
            Label("route", "the path's template; unknown: a path that is none of the API's"),
            Label("method", "the request's method; other: one that no route has", some=METHODS),
            Label(
                "code", "the status code; those of POST to what generates are there from the start", some=USUAL_CODES
            ),
        ),
        panel=Panel("Responses", Show.RATE, by=("route", "code")),
    ),
    Metric(
        "ryzanstein_http_requests_in_progress",
        Kind.GAUGE,
        "requests",
        "Requests whose response has not ended.",
        Group.HTTP,
        panel=Panel("Requests in progress", Show.VALUE),
    ),
    # --- process of the server ---------------------------------------------------------------------------------------
    Metric(
        "process_cpu_seconds_total",
        Kind.COUNTER,
        "seconds",
        "CPU time of the server's process.",
        Group.PROCESS,
        panel=Panel("CPUs used by the server", Show.RATE),
    ),
    Metric(
        "process_resident_memory_bytes",
        Kind.GAUGE,
        "bytes",
        "Memory of the server's process; the ranks' is apart.",
        Group.PROCESS,
        panel=Panel("Memory of the server", Show.VALUE),
    ),
    Metric(
        "process_open_fds",
        Kind.GAUGE,
        "files",
        "Open files and connections of the server's process.",
        Group.PROCESS,
        panel=Panel("Open files", Show.VALUE),
    ),
    Metric(
        "process_max_fds",
        Kind.GAUGE,
        "files",
        "How many files and connections the server's process may open.",
        Group.PROCESS,
    ),
    Metric(
        "process_start_time_seconds",
        Kind.GAUGE,
        "seconds",
        "When the server's process began, since the epoch of the calendar.",
        Group.PROCESS,
    ),
)

# What gateways for vLLM read and there is nothing of here.
LORA_REQUESTS = Metric(
    "vllm:lora_requests_info",
    Kind.GAUGE,
    "seconds",
    "LoRA adapters in use: none, and no room for any. The value is the time, since the epoch of the calendar.",
    Group.QUEUE,
    labels=(
        Label("max_lora", "adapters that may be in use at once", ("0",)),
        Label("running_lora_adapters", "those in use", ("",)),
        Label("waiting_lora_adapters", "those asked for", ("",)),
    ),
)
VLLM_METRICS = (LORA_REQUESTS,)

BY_NAME = {metric.name: metric for metric in (*METRICS, *VLLM_METRICS)}
