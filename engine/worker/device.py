"""Which device a rank computes on, in which type, with how many threads."""

import os

import torch

from engine.protocol.config import EngineConfig
from engine.protocol.model_config import ModelConfig


def choose_device(engine: EngineConfig, local_rank: int) -> torch.device:
    """Return this rank's device.

    Raises:
        ValueError: naming the option, if CUDA is asked for and not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if engine.device == "cpu" or (engine.device == "auto" and count < engine.tensor_parallel_size):
        return torch.device("cpu")
    if local_rank >= count:
        raise ValueError(f"--device cuda: rank needs CUDA device {local_rank}, and {count} are visible")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def choose_dtype(engine: EngineConfig, config: ModelConfig) -> torch.dtype:
    """Return the type of weights and arithmetic."""
    name = config.dtype if engine.dtype == "auto" else engine.dtype
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def set_threads(ranks_on_host: int) -> None:
    """Share the host's cores between its ranks, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_on_host))
