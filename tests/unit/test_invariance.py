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


class Group(CommunicationHandler):
    """A group whose collectives are carried by something."""

    def __init__(self, world_size: int, carrier: str) -> None:
        super().__init__(CPU)
        self.world_size = world_size
        self._carrier = carrier

    @property
    def carrier(self) -> str:
        return self._carrier


@pytest.mark.parametrize(
    "group", [Group(1, "none"), Group(2, "gloo"), Group(2, "shared-memory"), Group(8, "shared-memory")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_kept_by_the_cpp_kernels_and_sums_in_one_order(dtype: torch.dtype, group: Group) -> None:
    check_batch_invariance(CPU, dtype, OtherKernels(), group)


@pytest.mark.parametrize(
    ("device", "dtype", "kernels", "group", "message"),
    [
        (CUDA, torch.bfloat16, TORCH_KERNELS, Group(1, "none"), "is kept on CPUs, and the ranks run on cuda"),
        (CPU, torch.float16, TORCH_KERNELS, Group(1, "none"), "is kept in float32 and bfloat16, not float16"),
        (CPU, torch.float32, TORCH_KERNELS, Group(1, "none"), "needs the C\\+\\+ kernels"),
        (CPU, torch.float32, OtherKernels(), Group(3, "gloo"), "on 3 ranks needs collectives in shared memory"),
    ],
)
def test_it_is_refused_where_it_cannot_be_kept(
    device: torch.device, dtype: torch.dtype, kernels: Kernels, group: Group, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^--batch-invariant {message}"):
        check_batch_invariance(device, dtype, kernels, group)
