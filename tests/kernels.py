"""What tests compute with: each instruction set that this machine has, and torch."""

import os
from dataclasses import replace

from engine.kernels.instruction_sets import usable_instruction_sets
from engine.protocol.config import EngineConfig

KERNELS_VARIABLE = "RYZANSTEIN_KERNELS"  # pytest's --kernels, as every service that tests start reads it


def usable_kernels() -> list[str]:
    """Return every `--kernels` that this machine can compute with, the fastest first and torch last."""
    return [*(item.name for item in usable_instruction_sets()), "torch"]


def with_kernels_of_the_suite(config: EngineConfig) -> EngineConfig:
    """Return a configuration that computes with what pytest's `--kernels` says, where it can and leaves it open."""
    is_open = config.kernels == "auto" and config.device != "cuda" and config.dtype != "float16"
    return replace(config, kernels=os.environ.get(KERNELS_VARIABLE, "auto")) if is_open else config


if __name__ == "__main__":
    print(*usable_kernels())
