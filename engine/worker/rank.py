"""The life of a rank: HELLO, load, READY, allocate, STARTED, then steps until the end."""

import logging
import os
import signal
import socket
from dataclasses import dataclass

import torch
import zmq

from engine.attention.backends import attention_backend
from engine.checkpoint.fingerprint import fingerprint
from engine.checkpoint.loader import ModelLoadConfig
from engine.checkpoint.mapped_memory import MappedMemory
from engine.checkpoint.model_distributor import ModelDistributor
from engine.communication.handler import CommunicationHandler
from engine.communication.process_group import ProcessGroupManager
from engine.kernels.base import Kernels
from engine.models.llama import LlamaForCausalLM
from engine.models.registry import build_model
from engine.parallel.base import use_kernels
from engine.protocol.beats import RankBeats
from engine.protocol.channel import Channel
from engine.protocol.config import RankSpec, config_hash
from engine.protocol.errors import is_mistake
from engine.protocol.logs import write_json
from engine.protocol.messages import Failed, Hello, RankReport, Ready, RequestBatch, ScheduledStep, Start, Started
from engine.protocol.model_config import ModelConfig
from engine.sampling.cpu_sampler import choose_sampler
from engine.scheduler.scheduler import Scheduler
from engine.worker import kv_tensors
from engine.worker.device import (
    choose_device,
    choose_dtype,
    choose_kernels,
    choose_placement,
    ranks_on_host,
    set_torch_threads,
    stay_on_cpus,
)
from engine.worker.follower import Follower
from engine.worker.invariance import check_batch_invariance
from engine.worker.leader import Leader
from engine.worker.model_runner import ModelRunner
from engine.worker.parent import die_with_parent
from engine.worker.placement import Placement
from engine.worker.progress import LoadingReporter
from engine.worker.statistics import RankStatistics, process_memory
from engine.worker.step_times import FollowerStepTimes, LeaderStepTimes, NoStepTimes, StepTimes

# For ranks to meet, and for each collective. It is the orchestrator that finds ranks which hang, sooner.
LEAST_TIMEOUT_SECONDS = 300.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Shard:
    """What a rank holds when it is READY."""

    config: ModelConfig
    model: LlamaForCausalLM
    kernels: Kernels
    device: torch.device
    dtype: torch.dtype
    num_kv_heads: int  # of this rank
    weight_bytes: int
    mapped: MappedMemory  # the files that weights are views of


def run_rank(spec: RankSpec) -> int:
    """Be one rank until killed. Returns an exit code only when something failed; the orchestrator was told what."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the server's to answer
    rank = int(os.environ["RANK"])
    _configure_logging(spec, rank)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    control = Channel(context, spec.epoch, Start)
    control.connect(spec.control_endpoint(rank))
    is_set_up = False
    try:
        loop = _set_up(spec, rank, context, control)
        is_set_up = True
        control.send(Started(epoch=spec.epoch, rank=rank))
        loop.run()
    except Exception as error:
        # Before the loop, a mistake is what a user did; anything else is our own fault and shows its traceback.
        is_user_error = is_mistake(error) and not is_set_up
        if not is_user_error:
            logger.exception("cannot go on")
        text = str(error) if is_user_error else f"{type(error).__name__}: {error}"
        one_line = " ".join(text.split())
        control.send(Failed(epoch=spec.epoch, rank=rank, error=one_line, is_user_error=is_user_error))
    _linger(context, control)
    return 1


def _configure_logging(spec: RankSpec, rank: int) -> None:
    if spec.log.is_json:
        write_json(spec.log.level, process="rank", epoch=spec.epoch, rank=rank)
    else:
        logging.basicConfig(level=spec.log.level.upper(), format=f"%(levelname)s rank {rank}: %(message)s")


def hello(spec: RankSpec, rank: int, device: torch.device, placement: Placement) -> Hello:
    """Return this process's first word to the orchestrator."""
    return Hello(
        epoch=spec.epoch,
        rank=rank,
        pid=os.getpid(),
        host=socket.gethostname(),
        device=str(device),
        config_hash=config_hash(spec.engine),
        threads=placement.describe() if device.type == "cpu" else "",
    )


def _set_up(
    spec: RankSpec, rank: int, context: "zmq.Context[zmq.Socket[bytes]]", control: Channel
) -> Leader | Follower:
    """Say HELLO, load, agree with the other ranks, allocate; return what runs this rank's steps."""
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    device = choose_device(spec.engine, local_rank)
    placement = choose_placement(spec.engine, local_rank)
    control.send(hello(spec, rank, device, placement))
    # Never closed: ranks end by being killed, and after a failure the peers must not fail before its cause is told.
    group = ProcessGroupManager(
        device,
        timeout_seconds=max(LEAST_TIMEOUT_SECONDS, 2 * spec.engine.rank_timeout),
        collectives=spec.engine.collectives,
        is_timed=spec.engine.step_timing,
    ).tensor_parallel
    shard = _load(spec, group, device, placement, control)
    start = _agree(spec, group, shard, control)
    loop = _make_loop(spec, group, shard, start, context)
    if device.type == "cpu":
        stay_on_cpus(placement, shard.kernels)
    return loop


def _load(
    spec: RankSpec, group: CommunicationHandler, device: torch.device, placement: Placement, control: Channel
) -> _Shard:
    config = ModelConfig.from_directory(spec.engine.model)
    config.check_tensor_parallel_size(group.world_size)
    dtype = choose_dtype(spec.engine, config)
    model = build_model(config, group, device=device, dtype=dtype, quantization=spec.engine.quantization)
    kernels = choose_kernels(spec.engine, device, dtype, placement)
    if spec.engine.batch_invariant:
        check_batch_invariance(device, dtype, kernels, group)
    set_torch_threads(placement, kernels)
    use_kernels(model, kernels)
    distributor = ModelDistributor(group, _load_config(spec), LoadingReporter(control, spec.epoch, group.rank))
    report = distributor.load_model(model, spec.weights_directory)
    return _Shard(
        config=config,
        model=model,
        kernels=kernels,
        device=device,
        dtype=dtype,
        num_kv_heads=config.local_kv_heads(group.world_size),
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        mapped=report.memory,
    )


def _load_config(spec: RankSpec) -> ModelLoadConfig:
    return ModelLoadConfig(
        checkpoint_dir=spec.weights_directory,
        tp_size=spec.engine.tensor_parallel_size,
        use_memory_map=spec.engine.mmap,
        lock_memory=spec.engine.mlock,
        enable_prefetch=spec.engine.prefetch,
        verify_checksums=spec.engine.verify_checksums,
    )


def _agree(spec: RankSpec, group: CommunicationHandler, shard: _Shard, control: Channel) -> Start:
    """Say READY and wait until the orchestrator has found all ranks alike."""
    kv_block_bytes = kv_tensors.block_bytes(
        shard.config, block_size=spec.engine.block_size, num_kv_heads=shard.num_kv_heads, dtype=shard.dtype
    )
    num_ranks = ranks_on_host(spec.engine)
    num_kv_blocks = kv_tensors.num_blocks_that_fit(
        spec.engine,
        shard.config,
        bytes_per_block=kv_block_bytes,
        free_memory=kv_tensors.free_memory_share(shard.device, num_ranks),
        most_memory=kv_tensors.largest_cache(shard.device, num_ranks, weight_bytes=shard.weight_bytes),
    )
    control.send(
        Ready(
            epoch=spec.epoch,
            rank=group.rank,
            fingerprint=fingerprint(shard.model, spec.weights_directory, shard.config),
            num_kv_blocks=num_kv_blocks,
            kv_block_bytes=kv_block_bytes,
            memory={"weights": shard.weight_bytes, **_memory_now(shard.device)},
            kernels=shard.kernels.name,
        )
    )
    start = control.receive()
    assert isinstance(start, Start)
    return start


def _make_loop(
    spec: RankSpec,
    group: CommunicationHandler,
    shard: _Shard,
    start: Start,
    context: "zmq.Context[zmq.Socket[bytes]]",
) -> Leader | Follower:
    """Allocate the KV cache and return what runs this rank's steps."""
    kv_caches = kv_tensors.allocate(
        shard.config,
        num_blocks=start.num_kv_blocks,
        block_size=spec.engine.block_size,
        num_kv_heads=shard.num_kv_heads,
        dtype=shard.dtype,
        device=shard.device,
    )
    beats = RankBeats(spec.beats_path, group.rank, group.world_size)
    runner = ModelRunner(
        shard.model,
        attention_backend(shard.kernels, kv_caches),
        group,
        vocab_size=shard.config.vocab_size,
        device=shard.device,
        note_progress=beats.beat,
    )
    kv_bytes = sum(cache.key.nbytes + cache.value.nbytes for cache in kv_caches)
    memory = {"weights": shard.weight_bytes, "kv_cache": kv_bytes}
    step_times = _step_times(spec, group)
    statistics = RankStatistics(group, memory, shard.mapped, step_times, epoch=spec.epoch)
    if group.rank == 0:
        return _make_leader(spec, group, shard, start, context, runner, step_times, statistics, beats)
    steps = Channel(context, spec.epoch, ScheduledStep)
    steps.connect(spec.step_endpoint(group.rank))
    return Follower(runner, steps, step_times, statistics, beats)


def _memory_now(device: torch.device) -> dict[str, int]:
    """Return what the orchestrator tells of a rank's memory: sums over the ranks mean something."""
    memory = process_memory(device)
    return {kind: memory[kind] for kind in ("resident", "device_allocated") if kind in memory}


def _step_times(spec: RankSpec, group: CommunicationHandler) -> StepTimes:
    if not spec.engine.step_timing:
        return NoStepTimes()
    return (LeaderStepTimes if group.rank == 0 else FollowerStepTimes)(group.run_timer())


def _make_leader(
    spec: RankSpec,
    group: CommunicationHandler,
    shard: _Shard,
    start: Start,
    context: "zmq.Context[zmq.Socket[bytes]]",
    runner: ModelRunner,
    step_times: StepTimes,
    statistics: RankStatistics,
    beats: RankBeats,
) -> Leader:
    server = Channel(context, spec.epoch, RequestBatch)
    server.bind(spec.engine_endpoint)
    followers = [Channel(context, spec.epoch, RankReport) for _ in range(1, group.world_size)]
    for follower_rank, follower in enumerate(followers, start=1):
        follower.bind(spec.step_endpoint(follower_rank))
    scheduler = Scheduler(
        epoch=spec.epoch,
        num_kv_blocks=start.num_kv_blocks,
        block_size=spec.engine.block_size,
        max_model_len=start.max_model_len,
        max_num_seqs=spec.engine.max_num_seqs,
        max_num_batched_tokens=spec.engine.max_num_batched_tokens,
        enable_prefix_caching=spec.engine.enable_prefix_caching,
    )
    return Leader(
        scheduler,
        runner,
        server,
        followers,
        step_times,
        statistics,
        choose_sampler(shard.kernels),
        beats,
        epoch=spec.epoch,
        vocab_size=shard.config.vocab_size,
    )


def _linger(context: "zmq.Context[zmq.Socket[bytes]]", control: Channel) -> None:
    """Give the last word a moment to leave; the orchestrator ends this process when it has heard it."""
    control.socket.setsockopt(zmq.LINGER, 2000)
    control.socket.close()
    context.destroy(linger=2000)
