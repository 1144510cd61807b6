"""Which device, type and number of threads a rank chooses; CUDA devices are made up."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine.kernels.base import Kernels
from engine.kernels.instruction_sets import usable_instruction_sets
from engine.kernels.library import KernelLibrary
from engine.kernels.torch_kernels import TORCH_KERNELS, TorchKernels
from engine.protocol.config import EngineConfig
from engine.worker.device import choose_device, choose_dtype, choose_kernels, set_torch_threads, stay_on_cpus
from engine.worker.placement import Placement
from tests.configs import model_config

CPU = torch.device("cpu")
MODEL = model_config(dtype="bfloat16")


class Host:
    """A host with so many CUDA devices, on which so many ranks are started."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self.used: list[torch.device] = []
        patch.setattr(torch.cuda, "set_device", self.used.append)
        self.set(cuda_devices=0)

    def set(self, *, cuda_devices: int, **environment: int) -> None:
        self._patch.setattr(torch.cuda, "is_available", lambda: cuda_devices > 0)
        self._patch.setattr(torch.cuda, "device_count", lambda: cuda_devices)
        for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
            self._patch.delenv(name, raising=False)
        for name, value in environment.items():
            self._patch.setenv(name, str(value))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What torch was told; this process keeps its own threads."""
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    return told


@pytest.fixture
def other_kernels() -> Kernels:
    """Kernels that are not torch's, as far as threads are concerned."""
    return TorchKernels()


def test_auto_is_the_cpu_without_cuda_and_says_nothing(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.set(cuda_devices=0)
    assert choose_device(EngineConfig(tensor_parallel_size=2), 1) == CPU
    assert caplog.records == []


def test_auto_is_the_ranks_own_cuda_device_where_each_has_one(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.set(cuda_devices=2, LOCAL_WORLD_SIZE=2, WORLD_SIZE=2)
    chosen = choose_device(EngineConfig(tensor_parallel_size=2), 1)
    assert chosen == torch.device("cuda", 1)
    assert host.used == [chosen]
    assert caplog.records == []


def test_auto_counts_the_ranks_on_this_host_not_those_of_the_group(host: Host) -> None:
    host.set(cuda_devices=2, LOCAL_WORLD_SIZE=2, WORLD_SIZE=4)
    assert choose_device(EngineConfig(tensor_parallel_size=4), 0) == torch.device("cuda", 0)


@pytest.mark.parametrize("environment", [{"LOCAL_WORLD_SIZE": 3, "WORLD_SIZE": 2}, {"WORLD_SIZE": 3}])
def test_auto_takes_the_most_local_number_of_ranks_that_is_set(host: Host, environment: dict[str, int]) -> None:
    host.set(cuda_devices=2, **environment)
    assert choose_device(EngineConfig(tensor_parallel_size=2), 0) == CPU


@pytest.mark.parametrize(("tp_size", "kind"), [(2, "cuda"), (3, "cpu")])
def test_auto_counts_the_groups_ranks_when_no_launcher_says_otherwise(host: Host, tp_size: int, kind: str) -> None:
    host.set(cuda_devices=2)
    assert choose_device(EngineConfig(tensor_parallel_size=tp_size), 0).type == kind


def test_auto_warns_when_cuda_devices_go_unused(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.set(cuda_devices=1, LOCAL_WORLD_SIZE=2)
    assert choose_device(EngineConfig(tensor_parallel_size=2), 0) == CPU
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "--device auto: 1 CUDA device(s) for 2 ranks on this host, so they run on the CPU"


def test_cpu_is_the_cpu_whatever_else_is_there_and_says_nothing(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.set(cuda_devices=1, LOCAL_WORLD_SIZE=2)
    assert choose_device(EngineConfig(tensor_parallel_size=2, device="cpu"), 0) == CPU
    assert host.used == []
    assert caplog.records == []


def test_cuda_is_refused_where_the_rank_has_no_device(host: Host) -> None:
    host.set(cuda_devices=1, LOCAL_WORLD_SIZE=2)
    with pytest.raises(ValueError, match=r"^--device cuda: rank needs CUDA device 1, and 1 are visible$"):
        choose_device(EngineConfig(tensor_parallel_size=2, device="cuda"), 1)
    assert host.used == []


def test_auto_dtype_is_the_checkpoints() -> None:
    assert choose_dtype(EngineConfig(), MODEL) == torch.bfloat16


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_an_explicit_dtype_wins_over_the_checkpoints(name: str) -> None:
    assert choose_dtype(EngineConfig(dtype=name), MODEL) == getattr(torch, name)


def test_torch_has_the_ranks_threads_where_it_computes_and_else_one(threads: list[int], other_kernels: Kernels) -> None:
    placement = Placement(5, None, 0.0)
    set_torch_threads(placement, TORCH_KERNELS)
    set_torch_threads(placement, other_kernels)
    assert threads == [5, 1]


def test_a_rank_stays_on_its_first_cpu_beside_its_pool_and_with_torch_on_all_of_them(other_kernels: Kernels) -> None:
    allowed = sorted(os.sched_getaffinity(0))[:2]
    placement = Placement(len(allowed), tuple(allowed), 0.0)

    def affinity_after(kernels: Kernels) -> set[int]:
        stay_on_cpus(placement, kernels)
        return os.sched_getaffinity(0)  # of this thread, as what the function sets

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        assert one.submit(affinity_after, other_kernels).result() == {allowed[0]}
        assert other.submit(affinity_after, TORCH_KERNELS).result() == set(allowed)


def test_without_cpus_of_its_own_a_rank_runs_where_it_may() -> None:
    before = os.sched_getaffinity(0)
    stay_on_cpus(Placement(1, None, 0.0), TORCH_KERNELS)
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(not usable_instruction_sets(), reason="this machine has none of the instruction sets")
def test_threads_that_cannot_be_had_are_an_error_that_says_where_their_number_comes_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> int:
        raise RuntimeError("99 threads cannot be started")

    monkeypatch.setattr(KernelLibrary, "create_pool", refuse)
    with pytest.raises(ValueError, match=r"^99 threads cannot be started; OMP_NUM_THREADS says how many a rank has"):
        choose_kernels(EngineConfig(), CPU, torch.float32, Placement(99, None, 0.0))
