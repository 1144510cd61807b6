"""This process's place among the ranks, by torchrun's contract."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from engine.communication.handler import CommunicationHandler
from engine.communication.meeting import CannotShareError, share_memory
from engine.communication.segment import SHARED_MEMORY
from engine.communication.shared_memory import SharedMemoryCollectives
from engine.protocol.environment import STORE_FD_VARIABLE
from engine.worker.placement import asked_threads, place, read_processors

SPINS = 10  # a rank waits so much longer for a slower rank than a thread of its own for work

logger = logging.getLogger(__name__)


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


def _meet(environment: RankEnvironment, timeout: timedelta) -> Any:
    """Return the store that the ranks share: behind the socket that the orchestrator bound, or torchrun's own."""
    descriptor = os.environ.get(STORE_FD_VARIABLE)
    if descriptor is None:
        ranks = (environment.rank, environment.world_size)
        store, _, _ = next(rendezvous("env://", *ranks, timeout=timeout))
        return store
    return dist.TCPStore(  # type: ignore[attr-defined]  # exported, but not by name
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        environment.world_size,
        is_master=environment.rank == 0,
        timeout=timeout,
        master_listen_fd=int(descriptor) if environment.rank == 0 else None,
    )


class ProcessGroupManager:
    """Joins this process to its group, and leaves it.

        with ProcessGroupManager(device) as groups:
            model = build_model(config, groups.tensor_parallel, device=device, dtype=dtype)

    Ranks on CUDA devices use NCCL, CPU ranks the memory that they share; where they cannot (they are on several
    machines, or there are no C++ kernels, or no room in /dev/shm) gloo. One rank uses nothing at all.

    Args:
        device: where this rank computes; on CUDA, by torchrun's contract, the device numbered `LOCAL_RANK`.
        timeout_seconds: how long joining, and then each collective, may take.
        collectives: one of `engine.protocol.config.COLLECTIVES`, on all ranks the same.
        shared_memory: directory of a file system in memory.
        is_timed: whether collectives are timed and counted.

    Raises:
        ValueError: when torchrun's variables are missing or wrong, or `collectives` cannot be had.
        RuntimeError: when the other ranks do not come in time.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        timeout_seconds: float = 300.0,
        collectives: str = "auto",
        shared_memory: Path = SHARED_MEMORY,
        is_timed: bool = True,
    ) -> None:
        environment = RankEnvironment.read(os.environ)
        self.rank = environment.rank
        self.world_size = environment.world_size
        self.local_rank = environment.local_rank
        if device.type == "cuda" and collectives != "auto":
            raise ValueError(f"--collectives {collectives} is for ranks on CPUs: on CUDA devices they use NCCL")
        if self.world_size == 1:
            self.tensor_parallel = CommunicationHandler(device)
            return
        timeout = timedelta(seconds=timeout_seconds)
        store = _meet(environment, timeout)
        if device.type == "cpu" and collectives != "gloo":
            ends = _share_memory(environment, store, timeout, collectives, shared_memory, is_timed)
            if ends is not None:
                self.tensor_parallel = CommunicationHandler(device, ends)
                return
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "nccl",
            store=store,
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        self.tensor_parallel = CommunicationHandler(device, dist.group.WORLD, is_timed=is_timed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the group; the other ranks' open collectives then fail. May be called twice."""
        self.tensor_parallel.close()


def _share_memory(
    environment: RankEnvironment, store: Any, timeout: timedelta, collectives: str, directory: Path, is_timed: bool
) -> SharedMemoryCollectives | None:
    """Return this rank's end of collectives over shared memory, or None, on all ranks, where gloo is to do."""
    try:
        return share_memory(
            dist.PrefixStore("ryzanstein/shared-memory", store),  # type: ignore[attr-defined]  # as above
            environment.rank,
            environment.world_size,
            timeout_seconds=timeout.total_seconds(),
            spin_seconds=_spin_seconds(environment),
            is_timed=is_timed,
            directory=directory,
        )
    except CannotShareError as error:
        if collectives == "shared-memory":
            raise ValueError(f"--collectives shared-memory: {error}") from error
        if environment.rank == 0 and error.is_unexpected:
            logger.warning("the ranks use gloo, which is slower, since they cannot share memory: %s", error)
        return None
    except ValueError as error:
        raise ValueError(f"--collectives {collectives}: {error}; --collectives gloo needs no kernels") from error


def _spin_seconds(environment: RankEnvironment) -> float:
    """Return how long a rank that waits looks for the others before it sleeps: not at all where they need its core."""
    placement = place(read_processors(), environment.world_size, environment.local_rank, asked_threads())
    return SPINS * placement.spin_seconds
