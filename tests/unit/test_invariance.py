"""`--batch-invariant` is refused where what computes does not keep it."""

import pytest
import torch

from engine.communication.handler import CommunicationHandler
from engine.kernels.base import Kernels
from engine.kernels.torch_kernels import TORCH_KERNELS, TorchKernels
from engine.worker.invariance import check_batch_invariance

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class OtherKernels(TorchKernels):
    """Some that are not torch's."""

    name = "avx2"


def place(world_size: int) -> CommunicationHandler:
    return CommunicationHandler.place(0, world_size, CPU)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_kept_by_the_cpp_kernels_on_one_rank_and_two(dtype: torch.dtype, world_size: int) -> None:
    check_batch_invariance(CPU, dtype, OtherKernels(), place(world_size))


@pytest.mark.parametrize(
    ("device", "dtype", "kernels", "world_size", "message"),
    [
        (CUDA, torch.bfloat16, TORCH_KERNELS, 1, "is kept on CPUs, and the ranks run on cuda"),
        (CPU, torch.float16, TORCH_KERNELS, 1, "is kept in float32 and bfloat16, not float16"),
        (CPU, torch.float32, TORCH_KERNELS, 1, "needs the C\\+\\+ kernels"),
        (CPU, torch.float32, OtherKernels(), 3, "needs a sum over the 3 ranks in one order"),
    ],
)
def test_it_is_refused_where_it_cannot_be_kept(
    device: torch.device, dtype: torch.dtype, kernels: Kernels, world_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^--batch-invariant {message}"):
        check_batch_invariance(device, dtype, kernels, place(world_size))
