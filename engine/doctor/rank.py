"""`python -m engine.doctor.rank SPEC`: a rank that measures what serving will live on, instead of serving."""

import logging
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
import zmq

from engine.communication.handler import CommunicationHandler
from engine.communication.process_group import ProcessGroupManager
from engine.doctor.messages import Capacity, RankReport
from engine.kernels.base import Kernels
from engine.models.llama import LlamaForCausalLM
from engine.models.registry import build_model
from engine.protocol.channel import Channel
from engine.protocol.config import RankSpec
from engine.protocol.messages import Failed
from engine.protocol.model_config import ModelConfig
from engine.worker import host, kv_tensors
from engine.worker.device import choose_device, choose_dtype, choose_kernels, choose_placement, ranks_on_host
from engine.worker.invariance import check_batch_invariance
from engine.worker.parent import die_with_parent
from engine.worker.placement import Placement
from engine.worker.rank import hello

JOIN_SECONDS = 60.0
SMALL, LARGE = 4 << 10, 1 << 20  # bytes of an all-reduce: one token's hidden state, and a chunk of a prompt
REPEATS = {SMALL: 200, LARGE: 60}
WARM_UP = 10
BUFFER_BYTES = 256 << 20  # larger than caches
SMALLEST_BUFFER = 1 << 20
BANDWIDTH_SECONDS = 0.25  # of reading, and at least so often:
BANDWIDTH_REPEATS = 3


def run(spec_path: Path) -> int:
    """Measure, tell the doctor what was found or why not, and wait to be killed."""
    die_with_parent()  # first: a parent that is gone has removed the spec
    spec = msgspec.json.decode(spec_path.read_bytes(), type=RankSpec)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.ERROR)  # what is worth a warning is one of the doctor's checks
    rank = int(os.environ["RANK"])
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    control = Channel(context, spec.epoch)
    control.connect(spec.control_endpoint(rank))
    try:
        report = _measure(spec, rank, control)
    except Exception as error:  # whatever it is, the doctor tells it
        is_user_error = isinstance(error, ValueError)
        text = " ".join((str(error) if is_user_error else f"{type(error).__name__}: {error}").split())
        control.send(Failed(epoch=spec.epoch, rank=rank, error=text, is_user_error=is_user_error))
    else:
        control.send(report)
    signal.pause()  # the doctor kills the ranks when it has heard them all: none must fail by another's going
    return 1


def _measure(spec: RankSpec, rank: int, control: Channel) -> RankReport:
    local_rank = int(os.environ["LOCAL_RANK"])
    device, placement = choose_device(spec.engine, local_rank), choose_placement(spec.engine, local_rank)
    torch.set_num_threads(placement.num_threads)
    control.send(hello(spec, rank, device, placement))
    began = time.perf_counter()
    group = ProcessGroupManager(
        device, timeout_seconds=JOIN_SECONDS, collectives=spec.engine.collectives
    ).tensor_parallel
    group.barrier()
    joined = time.perf_counter() - began
    kernels = _kernels(spec, device, placement, group)
    are_sums_right = _are_sums_right(group)
    times = {size: _all_reduce_seconds(group, size) for size in REPEATS} if group.world_size > 1 else {}
    capacity = _capacity(spec, group)
    return RankReport(
        epoch=spec.epoch,
        rank=rank,
        num_threads=placement.num_threads,
        join_seconds=joined,
        are_sums_right=are_sums_right,
        all_reduce_seconds=times,
        read_bandwidth=statistics.median(_read_bandwidths(group, BUFFER_BYTES)),
        capacity=capacity,
        kernels=kernels.name,
        carrier=group.carrier,
    )


def _kernels(spec: RankSpec, device: torch.device, placement: Placement, group: CommunicationHandler) -> Kernels:
    """Choose what this rank would compute with, and check that it does what is asked of it."""
    dtype = choose_dtype(spec.engine, ModelConfig.from_directory(spec.engine.model))
    kernels = choose_kernels(spec.engine, device, dtype, placement)
    if spec.engine.batch_invariant:
        check_batch_invariance(device, dtype, kernels, group)
    return kernels


def _are_sums_right(group: CommunicationHandler) -> bool:
    """All-reduce what every rank knows the sum of."""
    numbers = torch.arange(LARGE // 4, dtype=torch.float32, device=group.device) % 1000
    summed = group.all_reduce(numbers * (group.rank + 1))
    return torch.equal(summed, numbers * (group.world_size * (group.world_size + 1) // 2))


def _all_reduce_seconds(group: CommunicationHandler, size: int) -> list[float]:
    tensor = torch.zeros(size // 4, dtype=torch.float32, device=group.device)
    for _ in range(WARM_UP):
        group.all_reduce(tensor)
    return [_timed(lambda: group.all_reduce(tensor), group.device) for _ in range(REPEATS[size])]


def _timed(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":  # pragma: cuda
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _read_bandwidths(group: CommunicationHandler, size: int) -> list[float]:
    """Return the bytes a second at which this rank reads `size` bytes of memory, each time, as all others do too."""
    free = kv_tensors.free_memory_share(group.device, group.world_size)
    size = max(SMALLEST_BUFFER, min(size, free // 2))
    buffer = torch.ones(size // 4, dtype=torch.float32, device=group.device)
    _timed(buffer.sum, group.device)
    group.barrier()
    seconds: list[float] = []
    while sum(seconds) < BANDWIDTH_SECONDS or len(seconds) < BANDWIDTH_REPEATS:
        seconds.append(_timed(buffer.sum, group.device))
    group.barrier()
    return [size / each for each in seconds]


def _capacity(spec: RankSpec, group: CommunicationHandler) -> Capacity:
    """Build this rank's shard without memory behind it, and compute what it would take."""
    config = ModelConfig.from_directory(spec.engine.model)
    dtype = choose_dtype(spec.engine, config)
    meta, quantization = torch.device("meta"), spec.engine.quantization
    model = build_model(config, group, device=meta, dtype=dtype, quantization=quantization)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    bytes_per_token = weight_bytes - _unread_bytes(model)
    num_ranks = ranks_on_host(spec.engine)
    block_bytes = kv_tensors.block_bytes(
        config, block_size=spec.engine.block_size, num_kv_heads=config.local_kv_heads(group.world_size), dtype=dtype
    )
    num_blocks, error = 0, ""
    try:
        num_blocks = kv_tensors.num_blocks_that_fit(
            spec.engine,
            config,
            bytes_per_block=block_bytes,
            free_memory=kv_tensors.free_memory_share(group.device, num_ranks, unloaded_bytes=weight_bytes),
            most_memory=kv_tensors.largest_cache(
                group.device, num_ranks, weight_bytes=weight_bytes, unloaded_bytes=weight_bytes
            ),
        )
    except ValueError as problem:
        error = str(problem)
    return Capacity(
        weight_bytes=weight_bytes,
        bytes_per_token=bytes_per_token,
        free_memory=_free_memory(group.device),
        kv_block_bytes=block_bytes,
        num_kv_blocks=num_blocks,
        error=error,
        best_read_bandwidth=max(_read_bandwidths(group, min(bytes_per_token, BUFFER_BYTES))),
    )


def _unread_bytes(model: LlamaForCausalLM) -> int:
    """Return the bytes of weights that a decode step leaves alone: an embedding that is not the LM head too."""
    embedding = model.model.embed_tokens.weight
    return 0 if model.lm_head.weight is embedding else embedding.nbytes


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host.free_memory()


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
