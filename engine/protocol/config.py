"""The engine's options: one definition of each name, default and help text. The command line is generated from here."""

import hashlib
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import msgspec

from engine.protocol.environment import EPOCH_VARIABLE
from engine.protocol.logs import LogConfig

MODEL_DTYPES = ("auto", "float32", "bfloat16", "float16")
COLLECTIVES = ("auto", "shared-memory", "gloo")
QUANTIZATIONS = ("none", "int8")
KERNELS = ("auto", "avx512_bf16", "avx512", "avx2", "torch")
SHORTEST_RANK_TIMEOUT, LONGEST_RANK_TIMEOUT = 1, 86400  # seconds
EMBEDDED_MODEL = Path(__file__).parents[1] / "embedded" / "model"


def option(
    default: Any, help: str, *, short: str = "", choices: tuple[str, ...] = (), unit: str = "", secret: bool = False
) -> Any:
    """Declare one option of a config dataclass.

    Args:
        default: value when nobody says otherwise.
        help: one sentence for `--help`.
        short: a second, short spelling such as `-tp`.
        choices: the words it takes, if it takes only some.
        unit: "bytes" for sizes, which may be written as `4GiB`; of lists, what their numbers count.
        secret: whether its value is never shown.
    """
    metadata = {"help": help, "short": short, "choices": choices, "unit": unit, "secret": secret}
    return field(default=default, repr=not secret, metadata=metadata)


def _largest(unit: str) -> int:
    """Return the largest value of a whole number: products of two of them must stay within 64 bits."""
    return 2**48 if unit == "bytes" else 2**31 - 1


def check_options(config: Any) -> None:
    """Raise ValueError, naming the option, if a value of a config dataclass is none of its choices, or out of range."""
    for item in fields(config):
        value, name = getattr(config, item.name), item.name.replace("_", "-")
        choices, unit = item.metadata.get("choices"), item.metadata.get("unit", "")
        if choices and value not in choices:
            raise ValueError(f"--{name} must be one of {', '.join(choices)}, not {value!r}")
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if is_number and not 1 <= value <= _largest(unit):
            raise ValueError(f"--{name} must be between 1 and {_largest(unit)}, not {value}")


def check_utf8(what: str, text: str) -> None:
    """Raise ValueError if `text`, which is `what`, has bytes that no message to another process can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} must be UTF-8 text, not {text!r}") from None


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that all ranks must agree on.

    Raises:
        ValueError: naming the option, when a value is out of range.
    """

    model: str = option(
        str(EMBEDDED_MODEL),
        "directory of a Hugging Face or a distributed checkpoint, or of one for each step (the latest is taken), or a "
        "name on the hub such as org/name; the embedded model when left out",
    )
    tensor_parallel_size: int = option(1, "ranks that the model is split over", short="-tp")
    device: str = option(
        "auto", "where the ranks run; auto takes CUDA when it is there", choices=("auto", "cpu", "cuda")
    )
    dtype: str = option(
        "auto",
        "type of weights and arithmetic; auto takes the checkpoint's",
        choices=MODEL_DTYPES,
    )
    quantization: str = option(
        "none",
        "type of the matrices in memory; int8 takes half of bfloat16's memory and time, and rounds while loading",
        choices=QUANTIZATIONS,
    )
    kernels: str = option(
        "auto",
        "what computes on a CPU: C++ for an instruction set, or torch; auto takes the fastest that there is",
        choices=KERNELS,
    )
    batch_invariant: bool = option(
        False, "promise that a result does not depend on what else is in the batch, bit for bit; on CPU, in C++"
    )
    collectives: str = option(
        "auto",
        "how ranks on CPUs add up: in memory that they share, or by gloo; auto shares memory where it can",
        choices=COLLECTIVES,
    )
    max_model_len: int | None = option(
        None, "longest prompt plus completion in tokens; the model's, or what the KV cache can hold, when left out"
    )
    max_num_seqs: int = option(64, "sequences that may be in one step")
    max_num_batched_tokens: int = option(2048, "token budget of one step; longer prompts are computed in chunks")
    block_size: int = option(16, "tokens in one KV block")
    num_kv_blocks: int | None = option(None, "KV blocks of each rank; sized from memory when left out")
    kv_cache_memory: int | None = option(
        None, "bytes of KV cache on each rank, such as 4GiB; sized from free memory when left out", unit="bytes"
    )
    enable_prefix_caching: bool = option(True, "keep KV blocks for prompts that begin alike")
    mmap: bool = option(True, "map weight files into memory on CPU; otherwise they are read into it, and all at once")
    mlock: bool = option(False, "keep mapped weights in memory, whatever else needs it (see ulimit -l)")
    prefetch: bool = option(True, "read mapped weights ahead, in the background, rather than when they are first used")
    verify_checksums: bool = option(False, "compare weight files with their checksums while loading")
    step_timing: bool = option(True, "time each collective, and what each step's time goes to, for /metrics")
    rank_timeout: float = option(
        30.0, "seconds after which a rank that gets no further in a step, or is stopped, is hung: all start anew"
    )

    def __post_init__(self) -> None:
        check_options(self)
        check_utf8("--model", self.model)
        if not SHORTEST_RANK_TIMEOUT <= self.rank_timeout <= LONGEST_RANK_TIMEOUT:
            raise ValueError(
                f"--rank-timeout must be between {SHORTEST_RANK_TIMEOUT} and {LONGEST_RANK_TIMEOUT} seconds, "
                f"not {self.rank_timeout:g}"
            )
        if self.num_kv_blocks is not None and self.kv_cache_memory is not None:
            raise ValueError("--num-kv-blocks and --kv-cache-memory both size the KV cache: give one of them")
        if self.mlock and not self.mmap:
            raise ValueError("--mlock keeps mapped weights in memory: it has no effect with --no-mmap")


EPOCH_FILES = ("control-*", "engine-*", "steps-*", "beats-*")
RUN_DIR_FILES = (*EPOCH_FILES, "status", "spec.json")


@dataclass(frozen=True, kw_only=True)
class RankSpec:
    """What one launch hands every rank: written to a file, read by `python -m engine.worker FILE`."""

    engine: EngineConfig
    epoch: int
    run_dir: str  # 0700 folder of the sockets of this service
    weights: str = ""  # directory that the weights are read from, where it is not the model's own: the shard cache
    num_kv_blocks: int | None = None  # of the groups before this one, which all requests in flight were measured by …
    max_model_len: int | None = None  # … and their context; None: there were none that came to be READY
    log: LogConfig = field(default_factory=LogConfig)  # of all processes

    @property
    def weights_directory(self) -> Path:
        """Where the ranks read the weights."""
        return Path(self.weights or self.engine.model)

    def control_endpoint(self, rank: int) -> str:
        """Where the orchestrator listens for `rank`."""
        return f"ipc://{self.run_dir}/control-{self.epoch}-{rank}"

    @property
    def engine_endpoint(self) -> str:
        """Where rank 0 listens for the server."""
        return f"ipc://{self.run_dir}/engine-{self.epoch}"

    def step_endpoint(self, rank: int) -> str:
        """Where rank 0 listens for follower `rank`."""
        return f"ipc://{self.run_dir}/steps-{self.epoch}-{rank}"

    @property
    def beats_path(self) -> Path:
        """Where the ranks say how far they have come; see `engine.protocol.beats`."""
        return Path(self.run_dir) / f"beats-{self.epoch}"

    @property
    def status_endpoint(self) -> str:
        """Where the server listens for the orchestrator."""
        return f"ipc://{self.run_dir}/status"


def read_spec(path: Path) -> RankSpec:
    """Return what a file hands every rank, for the epoch that this process was started in."""
    spec = msgspec.json.decode(path.read_bytes(), type=RankSpec)
    return replace(spec, epoch=int(os.environ.get(EPOCH_VARIABLE, spec.epoch)))


def config_hash(config: EngineConfig) -> str:
    """Return a hash that two ranks share only if they were given the same options."""
    return hashlib.sha256(msgspec.json.encode(config)).hexdigest()
