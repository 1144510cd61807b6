"""`python -m engine.bench.load_rank TASK`: a rank that loads a model, or maps its files, and reads all of it once."""

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from engine.bench import process_memory
from engine.bench.load_messages import FileRange, LoadSample, LoadTask
from engine.bench.rank_group import error_name, result_name
from engine.bench.touch import map_file, touch
from engine.checkpoint.model_distributor import ModelDistributor
from engine.checkpoint.targets import targets_of
from engine.communication.handler import CommunicationHandler
from engine.communication.process_group import ProcessGroupManager
from engine.models.registry import build_model
from engine.protocol.errors import EXIT_USER_ERROR
from engine.protocol.model_config import ModelConfig
from engine.worker.parent import die_with_parent

JOIN_SECONDS = 120.0


@dataclass(frozen=True)
class _Loaded:
    """What one way of loading gave."""

    tensors: list[Tensor]
    bytes_read: int
    metadata_seconds: float


def run(task_path: Path) -> int:
    """Measure once, leave the sample, and return the exit code."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is answered by the process that started this one
    torch.set_num_threads(1)
    task = msgspec.json.decode(task_path.read_bytes(), type=LoadTask)
    results, rank = Path(task.results), int(os.environ["RANK"])
    try:
        with ProcessGroupManager(torch.device("cpu"), timeout_seconds=JOIN_SECONDS) as groups:
            sample = _measure(groups.tensor_parallel, _way(task, groups.tensor_parallel))
            groups.tensor_parallel.barrier()  # none leaves while another still uses a processor's time
    except ValueError as error:
        (results / error_name(rank)).write_text(str(error))
        return EXIT_USER_ERROR
    (results / result_name(rank)).write_bytes(msgspec.json.encode(sample))
    return 0


def _way(task: LoadTask, group: CommunicationHandler) -> Callable[[], _Loaded]:
    """Return what is measured, with all that comes before it done."""
    if task.plain:
        return lambda: _map(task.plain[group.rank])
    config = ModelConfig.from_directory(task.directory)
    dtype = getattr(torch, config.dtype)
    model = build_model(config, group, device=group.device, dtype=dtype, quantization=task.quantization)

    def load() -> _Loaded:
        report = ModelDistributor(group).load_model(model, task.directory)
        return _Loaded([target.tensor for target in targets_of(model)], report.bytes_read, report.metadata_seconds)

    return load


def _map(ranges: tuple[FileRange, ...]) -> _Loaded:
    contents = [map_file(Path(item.path))[item.start : item.stop] for item in ranges]
    return _Loaded(contents, sum(content.nbytes for content in contents), 0.0)


def _measure(group: CommunicationHandler, way: Callable[[], _Loaded]) -> LoadSample:
    process_memory.reset_peak()
    memory, storage = process_memory.resident_bytes(), process_memory.storage_bytes()
    group.barrier()
    began = time.perf_counter()
    loaded = way()
    returned = time.perf_counter()
    touch(loaded.tensors)
    ended = time.perf_counter()
    read = process_memory.storage_bytes()
    return LoadSample(
        returned=returned - began,
        metadata=loaded.metadata_seconds,
        touched=ended - began,
        weight_bytes=sum(tensor.nbytes for tensor in loaded.tensors),
        bytes_read=loaded.bytes_read,
        storage_bytes=None if storage is None or read is None else read - storage,
        memory_growth=process_memory.resident_bytes() - memory,
        peak_growth=process_memory.peak_bytes() - memory,
    )


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
