"""Where a model comes from, and where it is kept for the next start."""

import re
from dataclasses import dataclass

from engine.protocol.config import option

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class ModelSourceConfig:
    """What concerns models that are not on this machine yet, or not in the form that maps into memory.

    Raises:
        ValueError: naming the option, when a value is out of range.
    """

    revision: str | None = option(None, "branch, tag or commit of a model on the hub; its main branch when left out")
    hf_token: str | None = option(
        None, "token for models on the hub that need one; the hub's own login when left out", secret=True
    )
    download_dir: str | None = option(None, "where downloaded models are kept; the hub's own cache when left out")
    offline: bool = option(False, "take models of the hub only from what was downloaded before")
    shard_cache: bool = option(
        True, "keep models on this machine split as they are served, so that the next start only maps files"
    )
    shard_cache_dir: str | None = option(None, "where; ~/.cache/ryzanstein/shards when left out")
    shard_cache_size: int = option(
        200 * 2**30, "most that is kept there; what was not used for longest goes first", unit="bytes"
    )

    def __post_init__(self) -> None:
        if not 1 <= self.shard_cache_size < 2**60:
            raise ValueError(f"--shard-cache-size must be between 1 and 2**60 bytes, not {self.shard_cache_size}")
        for name in ("revision", "hf_token", "download_dir", "shard_cache_dir"):
            if getattr(self, name) == "":
                raise ValueError(f"--{name.replace('_', '-')} must not be empty")


def is_hub_name(model: str) -> bool:
    """Whether `model` is written like a name on the hub: `org/name`. A directory of that name wins."""
    return _HUB_NAME.fullmatch(model) is not None
