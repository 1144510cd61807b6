"""Loads distributed checkpoints: each rank its own file, or the slices that it needs of any."""

import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from engine.checkpoint.agreement import GroupAgreement
from engine.checkpoint.distributor import WeightDistributor, refuse_extras, refuse_quantized
from engine.checkpoint.integrity import CHECKSUM_THREADS, checksum_problem
from engine.checkpoint.mapped_memory import MappedMemory
from engine.checkpoint.metadata import CheckpointMetadata, FileMetadata, TensorMetadata
from engine.checkpoint.meter import Meter, Progress
from engine.checkpoint.retry import read_bytes
from engine.checkpoint.sharded import ShardedFiles
from engine.checkpoint.staging import Stager
from engine.checkpoint.targets import Target, targets_of
from engine.checkpoint.tensor_header import DTYPE_NAMES
from engine.communication.handler import CommunicationHandler
from engine.protocol.model_directory import METADATA_FILE, find_model_directory
from engine.protocol.units import format_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelLoadConfig:
    """What to load, and how.

    Raises:
        ValueError: naming the option, when two contradict each other.
    """

    checkpoint_dir: str | Path
    tp_size: int
    step: int | None = None  # which of a directory of steps; None is the latest, or the directory itself
    use_memory_map: bool = True  # on CPU: tensors are views of the mapped files; else they are read into memory
    lock_memory: bool = False  # keep what is mapped in memory
    enable_prefetch: bool = True  # read what is mapped ahead, in the background
    verify_checksums: bool = False  # of the files, before anything of them is used

    def __post_init__(self) -> None:
        if self.tp_size < 1:
            raise ValueError(f"tp_size must be at least 1, not {self.tp_size}")
        if self.lock_memory and not self.use_memory_map:
            raise ValueError("lock_memory keeps mapped weights in memory: it has no effect without use_memory_map")

    def check_group(self, group: CommunicationHandler) -> None:
        """Raise ValueError if the group has another size than `tp_size`."""
        if self.tp_size != group.world_size:
            raise ValueError(f"tp_size is {self.tp_size}, but the group has {group.world_size} ranks")


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What loading took, on this rank."""

    directory: Path  # the weights'
    seconds: float  # all of it
    metadata_seconds: float  # of these, until this rank knew what there is to load
    bytes_read: int  # of weights: mapped, or copied; without padding where slices were read
    memory: MappedMemory = field(repr=False)  # the mapped files


class DistributedCheckpointLoader:
    """Loads a distributed checkpoint into the models of all ranks.

    Rank 0 reads the metadata for all. A rank of a checkpoint that was saved by as many ranks maps its own files:
    tensors become views of them, and nothing is read before it is used. Of any other checkpoint a rank reads the slices
    that its layers declare, wherever they are, and nothing else.

        with GroupAgreement(group) as agreement:
            DistributedCheckpointLoader(config, group, agreement).load(model)

    Args:
        config: what to load.
        group: the ranks.
        agreement: tells of other ranks' failures.
        progress: is told of the bytes that are done, and of how many; one call at a time.
    """

    def __init__(
        self,
        config: ModelLoadConfig,
        group: CommunicationHandler,
        agreement: GroupAgreement,
        progress: Progress = lambda _done, _total: None,
    ) -> None:
        config.check_group(group)
        self._config = config
        self._group = group
        self._agreement = agreement
        self._meter = Meter(agreement, progress)
        self._viewed: dict[str, FileMetadata] = {}  # files that tensors are views of
        self._copied_bytes = 0

    def load(self, model: nn.Module) -> LoadReport:
        """Fill every parameter of `model` and return what it took.

        Raises:
            ValueError: naming the file and the tensor, when the checkpoint does not hold exactly this model, cannot be
                read, or was replaced meanwhile. Only this rank's: the agreement makes it that of all.
        """
        began = time.perf_counter()
        directory, content = self._share_metadata()
        metadata = CheckpointMetadata.parse(content, directory / METADATA_FILE)
        metadata_seconds = time.perf_counter() - began
        targets = targets_of(model)
        wanted = "none" if all(target.quantizer is None for target in targets) else "int8"
        refuse_quantized(directory, metadata.quantization, wanted)
        checked = list(self._files_to_check(metadata))
        self._meter.start(sum(target.tensor.nbytes for target in targets) + sum(file.size for file in checked))
        self._check(directory, checked)
        near = self._group.rank * metadata.tp_size // self._group.world_size
        with ShardedFiles(
            directory,
            metadata,
            use_memory_map=self._config.use_memory_map,
            near=near,
            check=self._agreement.check,
        ) as source:
            self._fill(targets, source)
            _refuse_replaced(directory / METADATA_FILE, content)
            memory = self._keep(source)
            return LoadReport(
                directory=directory,
                seconds=time.perf_counter() - began,
                metadata_seconds=metadata_seconds,
                bytes_read=source.bytes_read,
                memory=memory,
            )

    def _share_metadata(self) -> tuple[Path, bytes]:
        """Return the checkpoint's directory and what its metadata.json holds, which rank 0 reads for all."""
        shared = self._agreement.share("metadata", self._read_metadata)
        directory, _, content = shared.partition(b"\0")
        return Path(os.fsdecode(directory)), content

    def _read_metadata(self) -> bytes:
        directory = find_model_directory(self._config.checkpoint_dir, self._config.step)
        return os.fsencode(directory) + b"\0" + read_bytes(directory / METADATA_FILE)

    # --- checksums ---------------------------------------------------------------------------------------------------

    def _files_to_check(self, metadata: CheckpointMetadata) -> Iterator[FileMetadata]:
        """Yield this rank's share of the files: its own, where each rank has one."""
        if self._config.verify_checksums:
            for rank in range(self._group.rank, metadata.tp_size, self._group.world_size):
                yield from metadata.files_of(rank)

    def _check(self, directory: Path, files: list[FileMetadata]) -> None:
        if not files:
            return
        is_over = threading.Event()  # one file is enough to fail: then the others are not read to their ends

        def advance(count: int) -> None:
            if is_over.is_set():
                raise InterruptedError
            self._meter.advance(count)

        with ThreadPoolExecutor(min(CHECKSUM_THREADS, len(files))) as pool:
            checks = [pool.submit(checksum_problem, directory, file, advance) for file in files]
            try:
                for check in as_completed(checks):
                    if problem := check.result():
                        raise ValueError(problem)
            finally:
                is_over.set()
                pool.shutdown(wait=False, cancel_futures=True)

    # --- tensors -----------------------------------------------------------------------------------------------------

    def _fill(self, targets: list[Target], source: ShardedFiles) -> None:
        refuse_extras(targets, source)
        stager = Stager(self._group.device, self._meter.advance)
        distributor = WeightDistributor(self._group.rank, self._group.world_size, stager)
        self._read_ahead(source)
        try:
            for target in targets:
                stored = self._stored_alike(target, source.metadata)
                if stored is None:
                    distributor.fill_target(target, source)
                    self._copied_bytes += target.tensor.nbytes
                else:
                    self._take(target, stored, source, stager)
        finally:
            stager.finish()  # copies on their way would land in memory that a failure has given back

    def _read_ahead(self, source: ShardedFiles) -> None:
        """Bring this rank's files into memory while they are copied to a device."""
        config, metadata = self._config, source.metadata
        is_copied = self._group.device.type == "cuda" and metadata.tp_size == self._group.world_size
        if is_copied and config.enable_prefetch and config.use_memory_map:  # pragma: cuda
            files = [source.open(file) for file in metadata.files_of(self._group.rank)]
            MappedMemory([(str(file.path), file.data) for file in files]).prefetch()

    def _stored_alike(self, target: Target, metadata: CheckpointMetadata) -> TensorMetadata | None:
        """Return the stored tensor whose part in this rank's file is the target as it stands."""
        stored = metadata.tensor_of.get(target.name)
        if stored is None or metadata.tp_size != self._group.world_size:
            return None
        if any(name in metadata.tensor_of for name in target.names[1:]):  # must be found to be the same
            return None
        is_alike = (
            stored.spec == target.spec
            and stored.dtype == DTYPE_NAMES[target.tensor.dtype]
            and stored.local_shape == tuple(target.tensor.shape)
        )
        return stored if is_alike else None

    def _take(self, target: Target, stored: TensorMetadata, source: ShardedFiles, stager: Stager) -> None:
        values = source.local(stored, self._group.rank)
        source.bytes_read += values.nbytes
        if target.tensor.device.type == "cpu":
            target.tensor.data = values
            file = source.metadata.file_of(stored, self._group.rank)
            self._viewed[file.name] = file
            self._meter.advance(values.nbytes)
        else:  # pragma: cuda
            stager.copy(target.tensor.data, values)
            self._copied_bytes += values.nbytes

    def _keep(self, source: ShardedFiles) -> MappedMemory:
        """Take care of the memory behind tensors that are views of files."""
        files = self._viewed.values() if self._config.use_memory_map else ()
        memory = MappedMemory([(str(source.directory / file.name), source.open(file).data) for file in files])
        if self._config.lock_memory:
            memory.lock()
            self._tell_what_has_no_effect(source.directory, memory)
        if self._config.enable_prefetch or self._config.lock_memory:
            memory.prefetch()
        return memory

    def _tell_what_has_no_effect(self, directory: Path, memory: MappedMemory) -> None:
        """Warn of what was asked for beside locking, and is not done."""
        if self._copied_bytes:
            count = format_bytes(self._copied_bytes)
            logger.warning("%s: %s are copied, not mapped: memory is not locked", directory, count)
        if memory.num_bytes and not self._config.enable_prefetch:
            logger.warning("%s: what is locked is read ahead, although prefetching is off", directory)


def _refuse_replaced(path: Path, content: bytes) -> None:
    """Raise ValueError if the metadata at `path` is another than `content`, after all files were opened.

    Then files opened by one rank may be of the old checkpoint and those of another of the new, which look alike but for
    their checksums. Where it was removed, all that was opened was of the old one.
    """
    if path.exists() and read_bytes(path) != content:
        raise ValueError(f"{path}: was replaced by another checkpoint's while this one was loaded; load again")
