"""This process's place among the ranks, by torchrun's contract."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from engine.communication.handler import CommunicationHandler
from engine.protocol.environment import STORE_FD_VARIABLE

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass(frozen=True)
class RankEnvironment:
    """What torchrun's variables say: `RANK` of `WORLD_SIZE`, and `LOCAL_RANK` on this machine."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> "RankEnvironment":
        """Read the variables. Without `WORLD_SIZE` there is one rank; without `LOCAL_RANK` it is the same as `RANK`.

        Raises:
            ValueError: naming the variable that is missing or wrong.
        """
        world_size = _integer(environ, "WORLD_SIZE", "1")
        rank = _integer(environ, "RANK", "0" if world_size == 1 else None)
        if not 0 <= rank < world_size:
            raise ValueError(f"RANK is {rank} and WORLD_SIZE {world_size}: ranks go from 0 to WORLD_SIZE - 1")
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
        if world_size > 1 and missing:
            raise ValueError(f"{missing[0]} is not set: ranks of a WORLD_SIZE of {world_size} meet there")
        return cls(rank, world_size, _integer(environ, "LOCAL_RANK", str(rank)))


def _integer(environ: Mapping[str, str], name: str, default: str | None) -> int:
    text = environ.get(name, default)
    if text is None:
        raise ValueError(f"{name} is not set")
    if not text.isdecimal():
        raise ValueError(f"{name} must be a whole number, not {text!r}")
    return int(text)


def _handed_store(environment: RankEnvironment, timeout: timedelta) -> Any:
    """Return the store behind the socket that the orchestrator bound, or None under another launcher."""
    descriptor = os.environ.get(STORE_FD_VARIABLE)
    if descriptor is None:
        return None
    return dist.TCPStore(  # type: ignore[attr-defined]  # exported, but not by name
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        environment.world_size,
        is_master=environment.rank == 0,
        timeout=timeout,
        master_listen_fd=int(descriptor) if environment.rank == 0 else None,
    )


class ProcessGroupManager:
    """Joins this process to its group, and leaves it: NCCL on `cuda`, gloo on `cpu`, nothing at all for one rank.

        with ProcessGroupManager(device) as groups:
            model = build_model(config, groups.tensor_parallel, device=device, dtype=dtype)

    Args:
        device: where this rank computes; on CUDA, by torchrun's contract, the device numbered `LOCAL_RANK`.
        timeout_seconds: how long joining, and then each collective, may take.

    Raises:
        ValueError: when torchrun's variables are missing or wrong.
        RuntimeError: when the other ranks do not come in time.
    """

    def __init__(self, device: torch.device, *, timeout_seconds: float = 300.0) -> None:
        environment = RankEnvironment.read(os.environ)
        self.rank = environment.rank
        self.world_size = environment.world_size
        self.local_rank = environment.local_rank
        process_group = None
        if self.world_size > 1:
            timeout = timedelta(seconds=timeout_seconds)
            store = _handed_store(environment, timeout)
            dist.init_process_group(
                BACKENDS[device.type],
                init_method="env://" if store is None else None,
                store=store,
                rank=self.rank,
                world_size=self.world_size,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
            process_group = dist.group.WORLD
        self.tensor_parallel = CommunicationHandler(device, process_group)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the group; the other ranks' open collectives then fail. May be called twice."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
