"""Which device a rank computes on, in which type, with how many threads."""

import logging
import os

import torch

from engine.kernels.base import Kernels
from engine.kernels.cpu_kernels import DTYPES, CPUKernels
from engine.kernels.library import find_library
from engine.kernels.torch_kernels import TORCH_KERNELS
from engine.protocol.config import EngineConfig
from engine.protocol.model_config import ModelConfig
from engine.worker.placement import Placement, asked_threads, place, read_processors

logger = logging.getLogger(__name__)


def choose_device(engine: EngineConfig, local_rank: int) -> torch.device:
    """Return this rank's device (see `device_of`), and make it the one that CUDA calls of this process are about."""
    num_ranks = ranks_on_host(engine)
    if engine.device == "auto":
        _warn_of_unused_devices(num_cuda_devices(), num_ranks)
    device = device_of(engine, local_rank, num_ranks)
    if device.type == "cuda":  # pragma: cuda
        torch.cuda.set_device(device)
    return device


def device_of(engine: EngineConfig, local_rank: int, num_ranks: int) -> torch.device:
    """Return the device of the rank that is number `local_rank` of `num_ranks` on this host.

    `auto` is CUDA where each rank on this host has a CUDA device of its own, and the CPU otherwise.

    Raises:
        ValueError: naming the option, if CUDA is asked for and not there.
    """
    count = num_cuda_devices()
    if engine.device == "cpu" or (engine.device == "auto" and count < num_ranks):
        return torch.device("cpu")
    if local_rank >= count:
        raise ValueError(f"--device {engine.device}: rank needs CUDA device {local_rank}, and {count} are visible")
    return torch.device("cuda", local_rank)


def num_cuda_devices() -> int:
    """Return how many CUDA devices this process can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def choose_dtype(engine: EngineConfig, config: ModelConfig) -> torch.dtype:
    """Return the type of weights and arithmetic."""
    name = config.dtype if engine.dtype == "auto" else engine.dtype
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def choose_kernels(engine: EngineConfig, device: torch.device, dtype: torch.dtype, placement: Placement) -> Kernels:
    """Return what this rank computes with: C++ on a CPU where it can, and otherwise torch.

    Args:
        engine: says what is asked for.
        device: the rank's.
        dtype: of weights and arithmetic.
        placement: the rank's threads.

    Raises:
        ValueError: naming the option, if what is asked for cannot be had; if the threads cannot.
    """
    if engine.kernels == "torch":
        return TORCH_KERNELS
    if device.type == "cuda" or dtype not in DTYPES:
        if engine.kernels != "auto":
            raise ValueError(
                f"--kernels {engine.kernels} computes on CPUs in float32 or bfloat16, not {device} in "
                f"{str(dtype).removeprefix('torch.')}"
            )
        return TORCH_KERNELS
    library = find_library(engine.kernels)
    if library is None:
        return TORCH_KERNELS
    cpus = None if placement.cpus is None else list(placement.cpus)
    try:
        pool = library.create_pool(placement.num_threads, cpus, placement.spin_seconds)
    except RuntimeError as error:
        raise ValueError(
            f"{error}; OMP_NUM_THREADS says how many a rank has, and ulimit -u how many all may be"
        ) from error
    return CPUKernels(library, pool, dtype, is_batch_invariant=engine.batch_invariant)


def choose_placement(engine: EngineConfig, local_rank: int) -> Placement:
    """Return the threads of the rank that is number `local_rank` on this host."""
    return place(read_processors(), ranks_on_host(engine), local_rank, asked_threads())


def set_torch_threads(placement: Placement, kernels: Kernels) -> None:
    """Give torch the rank's threads where it computes, and one beside the C++ kernels.

    What is left to it there is small, and threads of its own would look for work on cores that are computing.
    """
    torch.set_num_threads(placement.num_threads if kernels is TORCH_KERNELS else 1)


def stay_on_cpus(placement: Placement, kernels: Kernels) -> None:
    """Keep the calling thread where the placement has it; with torch, it and the threads that torch will start.

    A thread inherits this from the one that starts it: to be called when all that do not compute have been started.
    """
    if placement.cpus is not None:
        os.sched_setaffinity(0, placement.cpus if kernels is TORCH_KERNELS else placement.cpus[:1])


def ranks_on_host(engine: EngineConfig) -> int:
    """Return how many ranks run here, as torchrun and our own launcher tell this rank; alone, all of them do."""
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE")
    return int(local or engine.tensor_parallel_size)


def _warn_of_unused_devices(num_devices: int, num_ranks: int) -> None:
    """Warn of CUDA devices that go unused because there are too few."""
    if 0 < num_devices < num_ranks:
        logger.warning(
            "--device auto: %d CUDA device(s) for %d ranks on this host, so they run on the CPU",
            num_devices,
            num_ranks,
        )
