"""The domain on one page: every message that travels between server, orchestrator and ranks.

    server ── RequestBatch ─► rank 0 ── ScheduledStep ─► ranks 1 … N-1
    server ◄─ TokenBatch, StatsReport ── rank 0 ◄─ RankReport ── ranks 1 … N-1
    ranks ── Hello, Loading, Ready, Started, Failed ─► orchestrator ── Start ─► ranks
    orchestrator ── GroupStatus ─► server

Every message carries the epoch of the rank group it belongs to; a receiver drops messages of another epoch.
"""

from enum import StrEnum

import msgspec

PROTOCOL_VERSION = 1


class Message(msgspec.Struct, array_like=True, tag=True, frozen=True, forbid_unknown_fields=True):
    """Base of everything that is sent on its own."""

    epoch: int


class Part(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Base of what travels inside a message."""


# --- requests and tokens ---------------------------------------------------------------------------------------------


class SamplingParams(Part, frozen=True):
    """How one sequence is continued. A neutral value switches its option off.

    The random number of a token is a function of (`seed`, `choice_index`, token position) alone.
    """

    max_tokens: int
    min_tokens: int = 0  # no stop token is sampled before so many others were
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0
    seed: int = 0  # 0 <= seed < 2**64
    choice_index: int = 0
    stop_token_ids: tuple[int, ...] = ()  # emitted, then the sequence ends; the end-of-text ids are among them
    logit_bias: dict[int, float] = {}  # by token id, added to the logit
    repetition_penalty: float = 1.0  # divides what prompt or output hold already, where positive; else multiplies
    presence_penalty: float = 0.0  # taken from what the output holds already
    frequency_penalty: float = 0.0  # … as often as the output holds it
    logprobs: int | None = None  # report each sampled token's, and those of so many of the likeliest
    prompt_logprobs: int | None = None  # the same for the prompt's tokens, of which the first has none


class Request(Part, frozen=True):
    """One sequence to continue. `prompt_token_ids` has at least one token.

    One that a lost engine had begun comes with what was received of it, and goes on behind that as if nothing had been.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    received_token_ids: list[int] = []  # outputs: they count as such for penalties, limits and positions
    num_received_prompt_logprobs: int = 0  # of those asked for: only the others are wanted


class RequestBatch(Message, frozen=True):
    """What happened at the server since its last message."""

    new: list[Request] = []
    aborted: list[str] = []


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # a stop token was emitted; it is the last of its tokens
    LENGTH = "length"
    ERROR = "error"


class TokenLogprobs(Part, frozen=True):
    """A token's log-probability, natural, under the softmax of the model's own logits: before any sampling option."""

    token_id: int
    logprob: float  # -inf where the model excludes the token
    rank: int  # 1: no token is likelier
    top_token_ids: list[int]  # the likeliest tokens, in falling order, the lower id first among equals …
    top_logprobs: list[float]  # … and theirs


class TokenOutput(Part, frozen=True):
    """New tokens of one sequence. The last output of a sequence, and only that, has a `finish_reason`.

    An output without tokens and without a reason brings logprobs of the prompt.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    error: str | None = None  # with FinishReason.ERROR: a message for the person who sent the request
    logprobs: list[TokenLogprobs] = []  # one for each of `token_ids`, if they were asked for
    prompt_logprobs: list[TokenLogprobs] = []  # the prompt's next, if they were asked for
    queue_seconds: float | None = None  # with a sequence's first output: time from arrival at rank 0 to its first step
    num_cached_tokens: int | None = None  # with a sequence's first output: prompt tokens that were in the KV cache


class TokenBatch(Message, frozen=True):
    """All tokens of one step."""

    step: int
    outputs: list[TokenOutput]


# --- steps -----------------------------------------------------------------------------------------------------------


class PromptLogprobs(Part, frozen=True):
    """The logits at positions `start : stop` are wanted: each gives the logprobs of the token that follows it."""

    start: int
    stop: int
    num_top: int


class ScheduledRow(Part, frozen=True):
    """One sequence's share of a step.

    The rank appends `new_token_ids` and `new_block_ids` to what it knows of the sequence, then computes the tokens
    `num_computed_tokens : num_computed_tokens + num_scheduled_tokens`. `is_new`: forget what was known (a first step,
    or the first after a preemption); the lists then hold everything.
    """

    request_id: str
    is_new: bool
    new_token_ids: list[int]
    new_block_ids: list[int]
    num_computed_tokens: int
    num_scheduled_tokens: int
    samples: bool  # the last scheduled token is the sequence's last: a token follows
    prompt_logprobs: PromptLogprobs | None = None  # within the positions of the scheduled tokens


class ScheduledStep(Message, frozen=True):
    """One step's decision: taken by rank 0, obeyed by all. Rows are in batch order."""

    step: int
    rows: list[ScheduledRow]
    finished: list[str]  # sequences to forget before the step; preempted ones are not here, they come back whole


# --- statistics ------------------------------------------------------------------------------------------------------


class HistogramDelta(Part, frozen=True):
    """Observations since the last report, `counts[i]` of them in bucket i alone, of `engine.protocol.stats`.

    The bounds are those of its field; one more bucket, the last, is +Inf.
    """

    counts: list[int]
    sum: float


class RankStats(Message, frozen=True):
    """One rank's deltas since its last report; memory, and what is part of it, is a present value, not a delta."""

    rank: int
    collectives: dict[str, HistogramDelta]  # by `stats.OPERATIONS`: seconds, over `TIME_BUCKETS`
    memory: dict[str, int]  # bytes, by `stats.MEMORY_KINDS`; those of devices only where there is one
    waiting: dict[str, HistogramDelta] = {}  # of `collectives`, the time for slower ranks, where that is known
    backend: str = "none"  # what carries the collectives: one of `stats.BACKENDS`
    world_size: int = 1  # ranks that take part in them
    collective_bytes: dict[str, int] = {}  # by operation: bytes, each call counted as `stats.bus_factor` says
    phases: dict[str, HistogramDelta] = {}  # by `stats.PHASES`: seconds of each step, over `STEP_BUCKETS`
    weights_resident_ratio: float = 1.0  # of the weights that are mapped files, what is in memory; 1 of none


class RankReport(Message, frozen=True):
    """What a rank tells rank 0, which passes the statistics on and makes the ranks' skew of the rest."""

    stats: RankStats
    compute_seconds: list[float]  # of each step since the last report, in their order; none is left out


class SchedulerStats(Part, frozen=True):
    """Present values, and deltas since the last report."""

    num_running: int
    num_waiting: int
    num_kv_blocks: int
    num_free_kv_blocks: int
    preemptions: int  # delta
    steps: int  # delta
    integrity_checks: int  # delta: times the block bookkeeping was found whole when the engine went idle
    prefix_cache_queries: int = 0  # delta: prompt tokens looked up in the KV cache
    prefix_cache_hits: int = 0  # delta: … and found there
    batch_sizes: HistogramDelta | None = None  # sequences of each step, over `BATCH_SIZE_BUCKETS`; None: no step
    step_tokens: HistogramDelta | None = None  # tokens computed in each step, over `STEP_TOKENS_BUCKETS`


class StatsReport(Message, frozen=True):
    """The scheduler's statistics and those of ranks, about once a second while there is work and seldom otherwise."""

    scheduler: SchedulerStats
    ranks: list[RankStats]
    rank_skew: HistogramDelta | None = None  # of each step, the slowest rank's seconds of computing less the fastest's


# --- handshake and state ---------------------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """A rank's first word, before it loads."""

    rank: int
    pid: int
    host: str
    device: str
    config_hash: str
    threads: str = ""  # that compute, in words; nothing where a device does


class Loading(Message, frozen=True):
    """How far a rank has come with its weights; several a second at most, and none where loading takes no time."""

    rank: int
    loaded_bytes: int
    total_bytes: int


class Ready(Message, frozen=True):
    """A rank has loaded. The group is ready when all fingerprints are equal."""

    rank: int
    fingerprint: str
    num_kv_blocks: int  # as many as this rank can hold
    kv_block_bytes: int  # what each of them takes on this rank
    memory: dict[str, int]  # bytes by kind, as in RankStats
    kernels: str = ""  # what it computes with: an instruction set, or torch


class Failed(Message, frozen=True):
    """A rank cannot go on. `is_user_error`: the message names what to change, and no traceback is wanted."""

    rank: int
    error: str
    is_user_error: bool


class Start(Message, frozen=True):
    """Orchestrator to ranks: all agree; allocate so many KV blocks and begin."""

    num_kv_blocks: int
    max_model_len: int


class Started(Message, frozen=True):
    """A rank has allocated its KV blocks and takes steps."""

    rank: int


class GroupState(StrEnum):
    """The life of the rank group, as /ready shows it."""

    STARTING = "STARTING"
    READY = "READY"
    RECOVERING = "RECOVERING"  # a rank died or hung: the next epoch's ranks are being started
    FAILED = "FAILED"


class RankInfo(Part, frozen=True):
    """Where one rank runs."""

    rank: int
    pid: int
    host: str
    device: str
    threads: str = ""  # that compute, in words; nothing where a device does


class Recovery(Part, frozen=True):
    """How one group was lost, and how long the next took, as far as is known."""

    cause: str  # one line
    noticed_at: float  # seconds since the epoch of the calendar
    in_step: list[str] = []  # request ids in the step that was not finished; none if there was no such step
    seconds: dict[str, float] = {}  # by phase: kill, respawn (until each rank said HELLO), load (until READY)
    kind: str = "died"  # a word for the cause: died, hung, failed (by its own word), orchestrator, link


class GroupStatus(Message, frozen=True):
    """Orchestrator to server, at each change of state. The epoch is that of the group that is there or is coming."""

    state: GroupState
    ranks: list[RankInfo] = []
    engine_endpoint: str = ""  # READY: where rank 0 takes RequestBatch messages
    max_model_len: int = 0  # READY
    num_kv_blocks: int = 0  # READY
    memory: dict[str, int] = {}  # READY: bytes by kind, summed over the ranks
    error: str = ""  # FAILED: one line
    is_user_error: bool = False  # FAILED
    loaded_bytes: int = 0  # STARTING: of all ranks' weights …
    total_bytes: int = 0  # STARTING: … of so many; 0 while nobody knows
    service_cpus: list[int] = []  # READY: where the server should run; none leaves that to the kernel
    kernels: str = ""  # READY: what the ranks compute with
    recovery: Recovery | None = None  # RECOVERING, and the READY after it
