"""What `--batch-invariant` promises, and where that cannot be kept.

A row's result depends on its own tokens alone, bit for bit: not on what else is in the batch, nor on how its tokens
were cut into chunks, whether it was preempted and computed again, or found its beginning in the prefix cache. The C++
kernels have this property by construction: an output is one sum in one order, whatever the number of rows and of
threads. So are the keys and values that they write: a cached block holds the bits that would be computed anew.
Collectives in shared memory add up in the order of the ranks.
"""

import torch

from engine.communication.handler import CommunicationHandler
from engine.kernels.base import Kernels
from engine.kernels.cpu_kernels import DTYPES
from engine.kernels.torch_kernels import TORCH_KERNELS


def check_batch_invariance(
    device: torch.device, dtype: torch.dtype, kernels: Kernels, group: CommunicationHandler
) -> None:
    """Check that what this rank computes with keeps the promise.

    Args:
        device: the rank's.
        dtype: of weights and arithmetic.
        kernels: of the layers.
        group: the ranks.

    Raises:
        ValueError: naming the option, if it does not.
    """
    if device.type != "cpu":
        raise ValueError(f"--batch-invariant is kept on CPUs, and the ranks run on {device.type}")
    if dtype not in DTYPES:
        raise ValueError(f"--batch-invariant is kept in float32 and bfloat16, not {str(dtype).removeprefix('torch.')}")
    if kernels is TORCH_KERNELS:
        raise ValueError("--batch-invariant needs the C++ kernels: how torch adds up depends on the number of rows")
    if group.carrier == "gloo" and group.world_size > 2:  # of two summands it does not matter which comes first
        raise ValueError(
            f"--batch-invariant on {group.world_size} ranks needs collectives in shared memory, in /dev/shm: in what "
            "order gloo adds up depends on where a row lies in the batch"
        )
