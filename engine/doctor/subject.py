"""What is examined, and what checks have found out that later ones build on."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.doctor.messages import RankReport
from engine.protocol.checks import MissingBasisError
from engine.protocol.config import EngineConfig, RankSpec
from engine.protocol.model_config import ModelConfig
from engine.worker.device import device_of


@dataclass
class Subject:
    """One machine and one configuration."""

    spec: RankSpec
    spec_path: Path
    model: ModelConfig | None = None  # once config.json was found to be usable
    is_split: bool = False  # once the model was found to split over the ranks
    are_files_whole: bool = False  # once the weight files could be opened
    are_weights_whole: bool = False  # once every tensor was found in them
    reports: list[RankReport] = field(default_factory=list)  # of the ranks, once they have run

    @property
    def engine(self) -> EngineConfig:
        """The options."""
        return self.spec.engine

    @property
    def tp_size(self) -> int:
        """How many ranks there are to be."""
        return self.spec.engine.tensor_parallel_size

    def device(self, rank: int) -> torch.device:
        """Return the device of a rank.

        Raises:
            ValueError: naming the option, if CUDA is asked for and not there.
        """
        return device_of(self.engine, rank, self.tp_size)

    def usable_model(self) -> ModelConfig:
        """Return what config.json says.

        Raises:
            MissingBasisError: if it cannot be used.
        """
        if self.model is None:
            raise MissingBasisError("a usable config.json")
        return self.model

    def all_reports(self) -> list[RankReport]:
        """Return what the ranks measured, in order of rank.

        Raises:
            MissingBasisError: if they did not.
        """
        if not self.reports:
            raise MissingBasisError("running ranks")
        return self.reports
