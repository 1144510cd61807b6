"""Where the model comes from: what is checked is what is here. Nothing is downloaded."""

from dataclasses import replace
from pathlib import Path

from engine.protocol.checks import Check, Finding, MissingBasisError, ok, skipped, warning
from engine.protocol.config import EngineConfig
from engine.protocol.model_config import ModelConfig
from engine.protocol.units import format_bytes
from server.config import ServerConfig
from server.model_source import hub
from server.model_source.resolve import find_local, is_on_hub
from server.model_source.sharded_weights import SMALLEST_MODEL, find_entry

SECTION = "source"


class ModelSource:
    """The model that is named, and the directory that it turns out to be.

    `engine` is what the other checks are about, and `is_here` whether there is anything for them to look at.
    """

    def __init__(self, engine: EngineConfig, server: ServerConfig) -> None:
        self.engine = engine
        self.is_here = not is_on_hub(engine.model)
        self._server = server

    def checks(self) -> list[Check]:
        """Return this section's checks."""
        return [Check(SECTION, "model", self._find), Check(SECTION, "shard cache", self._shard_cache)]

    def _find(self) -> Finding:
        named = self.engine.model
        try:
            directory = find_local(named, self._server) if self.is_here else hub.find(named, self._server)
        except hub.NotDownloadedError:
            return self._describe(named)
        self.engine, self.is_here = replace(self.engine, model=str(directory)), True
        return ok(str(directory))

    def _describe(self, named: str) -> Finding:
        there = hub.describe(named, self._server)
        size = format_bytes(there.size)
        return warning(
            f"{named} is not here yet: serving downloads {size} in {there.num_files} files from {there.endpoint}",
            "ask again when it is here: the other checks look into its files",
        )

    def _shard_cache(self) -> Finding:
        if not self._server.shard_cache:
            return skipped("--no-shard-cache")
        if not self.is_here:
            raise MissingBasisError("the model's files")
        try:
            model = ModelConfig.from_directory(self.engine.model)
        except ValueError as error:
            raise MissingBasisError("a usable config.json") from error
        entry = find_entry(Path(self.engine.model), self.engine, model, self._server)
        if entry is None:
            return skipped(f"nothing to keep: split already, or less than {format_bytes(SMALLEST_MODEL)}")
        if entry.is_there:
            return ok(f"{entry.directory} is mapped")
        size = format_bytes(entry.key.entry_bytes)
        return ok(f"the first start writes {size} to {entry.directory}, later ones map them")
