"""The engine's options: one definition of each name, default and help text. The command line is generated from here."""

import hashlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec

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
        unit: "bytes" for sizes, which may be written as `4GiB`.
        secret: whether its value is never shown.
    """
    metadata = {"help": help, "short": short, "choices": choices, "unit": unit, "secret": secret}
    return field(default=default, repr=not secret, metadata=metadata)


def _largest(unit: str) -> int:
    """Return the largest value of a whole number: products of two of them must stay within 64 bits."""
    return 2**48 if unit == "bytes" else 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that all ranks must agree on.

    Raises:
        ValueError: naming the option, when a value is out of range.
    """

    model: str = option(str(EMBEDDED_MODEL), "directory of a Hugging Face checkpoint; the embedded model when left out")
    tensor_parallel_size: int = option(1, "ranks that the model is split over", short="-tp")
    device: str = option(
        "auto", "where the ranks run; auto takes CUDA when it is there", choices=("auto", "cpu", "cuda")
    )
    dtype: str = option(
        "auto",
        "type of weights and arithmetic; auto takes the checkpoint's",
        choices=("auto", "float32", "bfloat16", "float16"),
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

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            choices = item.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"--{item.name.replace('_', '-')} must be one of {', '.join(choices)}, not {value!r}")
            limit = _largest(item.metadata["unit"])
            is_number = isinstance(value, int) and not isinstance(value, bool)
            if is_number and not 1 <= value <= limit:
                raise ValueError(f"--{item.name.replace('_', '-')} must be between 1 and {limit}, not {value}")
        if self.num_kv_blocks is not None and self.kv_cache_memory is not None:
            raise ValueError("--num-kv-blocks and --kv-cache-memory both size the KV cache: give one of them")


RUN_DIR_FILES = ("control-*", "engine-*", "steps-*", "status", "spec.json")


@dataclass(frozen=True, kw_only=True)
class RankSpec:
    """What one launch hands every rank: written to a file, read by `python -m engine.worker FILE`."""

    engine: EngineConfig
    epoch: int
    run_dir: str  # 0700 folder of the sockets of this service

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
    def status_endpoint(self) -> str:
        """Where the server listens for the orchestrator."""
        return f"ipc://{self.run_dir}/status"


def config_hash(config: EngineConfig) -> str:
    """Return a hash that two ranks share only if they were given the same options."""
    return hashlib.sha256(msgspec.json.encode(config)).hexdigest()
