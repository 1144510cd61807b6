"""Loads a model on all ranks of a group with one call, from either form of checkpoint."""

import logging
import os
import time
from dataclasses import replace
from pathlib import Path

from torch import nn

from engine.checkpoint.agreement import GroupAgreement
from engine.checkpoint.distributor import WeightDistributor
from engine.checkpoint.huggingface import HuggingFaceFiles
from engine.checkpoint.loader import DistributedCheckpointLoader, LoadReport, ModelLoadConfig
from engine.checkpoint.mapped_memory import MappedMemory
from engine.checkpoint.meter import Meter, Progress
from engine.checkpoint.staging import Stager
from engine.checkpoint.targets import targets_of
from engine.communication.handler import CommunicationHandler
from engine.protocol.model_directory import find_model_directory, is_distributed

logger = logging.getLogger(__name__)


class ModelDistributor:
    """Brings weights to the ranks of a group.

        report = ModelDistributor(group).load_model(model, "checkpoints")

    Args:
        group: the ranks; `CommunicationHandler(device)` is one that is alone.
        config: how to load; the call names what. Its defaults if left out.
        progress: is told of the bytes that this rank has done, and of how many; one call at a time.
    """

    def __init__(
        self,
        group: CommunicationHandler,
        config: ModelLoadConfig | None = None,
        progress: Progress = lambda _done, _total: None,
    ) -> None:
        self._group = group
        self._config = config or ModelLoadConfig(checkpoint_dir="", tp_size=group.world_size)
        self._progress = progress

    def load_model(self, model: nn.Module, path: str | Path) -> LoadReport:
        """Fill every parameter of each rank's `model`, in its type, and its padding with zeros.

        Collective: all ranks call it, and all return, or all raise the same error, soon after the first has failed.

        Args:
            model: this rank's shard; parallel layers say what of which tensor they hold, and others hold all of it.
                On CPU its parameters may become views of mapped files, which share memory with other processes; writing
                to them changes neither the files nor what others see.
            path: of a distributed checkpoint, saved by any number of ranks; of a directory with a checkpoint for each
                step (the latest is taken); or of a Hugging Face directory.

        Raises:
            ValueError: naming the file and the tensor, when the checkpoint does not hold exactly this model, or cannot
                be read.
            RuntimeError: naming the rank that died, or failed otherwise.
        """
        with GroupAgreement(self._group) as agreement:
            self._config.check_group(self._group)
            directory = self._find_together(path, agreement)
            if not is_distributed(directory):
                return self._load_hugging_face(model, directory, agreement)
            config = replace(self._config, checkpoint_dir=directory, step=None)
            return DistributedCheckpointLoader(config, self._group, agreement, self._progress).load(model)

    def _find_together(self, path: str | Path, agreement: GroupAgreement) -> Path:
        """Return the directory that rank 0 has found, so that all load the same step."""
        wanted = [os.fsencode(path), str(self._config.step).encode()]
        shared = agreement.share("directory", lambda: b"\0".join([*wanted, os.fsencode(self._find(path))]))
        *expected, directory = shared.split(b"\0")
        if wanted != expected:
            asked, others = (f"{os.fsdecode(path)}, step {step.decode()}" for path, step in (wanted, expected))
            raise ValueError(f"path: rank {self._group.rank} is to load {asked}, and rank 0 {others}")
        return Path(os.fsdecode(directory))

    def _find(self, path: str | Path) -> Path:
        return find_model_directory(path, self._config.step)

    def _load_hugging_face(self, model: nn.Module, directory: Path, agreement: GroupAgreement) -> LoadReport:
        if self._group.rank == 0:
            self._tell_what_has_no_effect(directory)
        began = time.perf_counter()
        meter = Meter(agreement, self._progress)
        meter.start(sum(target.tensor.nbytes for target in targets_of(model)))
        with HuggingFaceFiles(directory, use_memory_map=self._config.use_memory_map, check=agreement.check) as source:
            metadata_seconds = time.perf_counter() - began
            stager = Stager(self._group.device, meter.advance)
            WeightDistributor(self._group.rank, self._group.world_size, stager).fill(model, source)
            return LoadReport(
                directory=directory,
                seconds=time.perf_counter() - began,
                metadata_seconds=metadata_seconds,
                bytes_read=source.bytes_read,
                memory=MappedMemory([]),
            )

    def _tell_what_has_no_effect(self, directory: Path) -> None:
        if self._config.verify_checksums:
            logger.warning("%s: has no checksums to verify, as distributed checkpoints have", directory)
        if self._config.lock_memory:
            logger.warning("%s: its weights are copied, not mapped: memory is not locked", directory)
