"""Saves a model that lives on several ranks, each its own part, so that a crash at any moment loses nothing."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
from torch import nn

from engine.checkpoint.agreement import GroupAgreement
from engine.checkpoint.atomic import NewDirectory, remove_directory, unwritable
from engine.checkpoint.destination import TEXT_FILES, write_file
from engine.checkpoint.file_lock import DirectoryLock
from engine.checkpoint.layout import lay_out
from engine.checkpoint.metadata import CheckpointMetadata, FileMetadata, TensorMetadata, file_name
from engine.checkpoint.rank_writer import RankContents, RankWriter, difference, savable_targets, unlike_copies
from engine.checkpoint.retry import read_bytes
from engine.checkpoint.targets import Target
from engine.communication.handler import CommunicationHandler
from engine.protocol.model_directory import METADATA_FILE, step_directory, steps_in

logger = logging.getLogger(__name__)


class CheckpointSaver:
    """Saves checkpoints, one for each step, into one directory that all ranks see.

        saver = CheckpointSaver("checkpoints", CommunicationHandler(device, dist.group.WORLD), keep_last=3)
        saver.save_checkpoint(model, CheckpointMetadata(model_name="mine"), step)

    Args:
        checkpoint_dir: gets `model-step-N` directories; made if it is not there. Rank 0's counts.
        group: the ranks that hold the model: those of one replica, where there are several.
        keep_last: how many steps are kept, the one just written and those with the highest numbers; None keeps all.
        max_file_size: most bytes of one file, where no tensor alone takes more; None writes one file a rank.
        tokenizer_files: a directory whose tokenizer, chat template and generation config are copied; rank 0's counts.
        timeout_seconds: that ranks wait for one that is not seen to get on.

    Raises:
        ValueError: naming the argument that makes no sense.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        group: CommunicationHandler,
        *,
        keep_last: int | None = None,
        max_file_size: int | None = None,
        tokenizer_files: str | Path | None = None,
        timeout_seconds: float = 300.0,
    ) -> None:
        for name, value in (("keep_last", keep_last), ("max_file_size", max_file_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self._directory = Path(checkpoint_dir)
        self._group = group
        self._keep_last = keep_last
        self._max_file_size = max_file_size
        self._tokenizer_files = None if tokenizer_files is None else Path(tokenizer_files)
        self._timeout = timeout_seconds

    def save_checkpoint(self, model: nn.Module, metadata: CheckpointMetadata, step: int) -> Path:
        """Write the model of this step, and return its directory.

        Collective: all ranks call it, and all return, or all raise the same error, soon after the first has failed. A
        reader, and whoever comes after a crash, finds what was there before or the whole new checkpoint; a step that
        is there already is replaced. The model must not change meanwhile: its tensors are read as they are written.

        Args:
            model: this rank's shard; parallel layers say what of which tensor they hold, and others hold all of it.
            metadata: its name, its configuration and what else is to be remembered; rank 0's counts.
            step: its number; the same on all ranks.

        Raises:
            ValueError: naming the file that cannot be written, or the tensor that cannot be saved, or that two ranks
                do not have in the same way.
            RuntimeError: naming the rank that died, or failed otherwise.
        """
        with contextlib.ExitStack() as opened, self._agreement() as agreement:
            targets = savable_targets(model)
            tensors = lay_out(targets, max_file_size=self._max_file_size)
            self._compare(agreement, tensors, step)
            described = replace(metadata, step=step).of_tensors(tensors, self._group.world_size)
            leader = _Leader(opened, self._directory, described, self._tokenizer_files)
            shared = agreement.share("directory", leader.begin)
            new, checkpoint_id = msgspec.json.decode(shared, type=tuple[str, str])
            contents = self._write(Path(new), checkpoint_id, targets, tensors, agreement)
            written = agreement.gather("written", msgspec.json.encode(contents))
            if self._group.rank == 0:
                leader.finish([msgspec.json.decode(each, type=RankContents) for each in written])
                self._remove_old(step)
        return step_directory(self._directory, step)

    def _agreement(self) -> GroupAgreement:
        return GroupAgreement(self._group, timeout_seconds=self._timeout)

    def _compare(self, agreement: GroupAgreement, tensors: tuple[TensorMetadata, ...], step: int) -> None:
        """Find out, before anything is written, whether all ranks are to save the same model."""
        own, *others = agreement.gather("model", msgspec.json.encode((step, tensors))) or [b""]
        for rank, other in enumerate(others, 1):
            if other == own:
                continue
            its_step, its_tensors = msgspec.json.decode(other, type=tuple[int, tuple[TensorMetadata, ...]])
            if its_step != step:
                raise ValueError(f"step: rank 0 saves {step}, and rank {rank} {its_step}")
            raise ValueError(f"rank 0 and rank {rank} have different models: {difference(tensors, its_tensors)}")

    def _write(
        self,
        new: Path,
        checkpoint_id: str,
        targets: Sequence[Target],
        tensors: Sequence[TensorMetadata],
        agreement: GroupAgreement,
    ) -> RankContents:
        rank = self._group.rank
        try:
            writer = RankWriter(new, rank, self._group.world_size, agreement.check)
            return writer.write(targets, tensors, checkpoint_id)
        except FileNotFoundError as error:
            raise ValueError(f"{new}: rank {rank} does not see the directory that rank 0 has made there") from error
        except OSError as error:
            file = Path(str(error.filename)).name
            raise unwritable(self._directory / new.name / file, error) from error

    def _remove_old(self, step: int) -> None:
        """Remove steps beyond `keep_last`. What cannot be removed is no reason to call the new one failed."""
        if self._keep_last is None:
            return
        try:
            others = [other for other in steps_in(self._directory) if other != step]
            for other in others[: max(0, len(others) - (self._keep_last - 1))]:
                remove_directory(step_directory(self._directory, other))
        except OSError as error:
            logger.warning("%s: old steps cannot be removed: %s", error.filename, error.strerror)


class _Leader:
    """What rank 0 does for all: it makes the directory, describes what is in it, and puts it in its place.

    Args:
        opened: is closed when all ranks have ended; what was written is removed then, unless it has its place.
        parent: the directory of all steps.
        metadata: of the new checkpoint, without files.
        tokenizer_files: where the text files are that go into it.
    """

    def __init__(
        self,
        opened: contextlib.ExitStack,
        parent: Path,
        metadata: CheckpointMetadata,
        tokenizer_files: Path | None,
    ) -> None:
        self._opened = opened
        self._parent = parent.absolute()
        self._destination = step_directory(self._parent, metadata.step)
        self._metadata = metadata
        self._tokenizer_files = tokenizer_files

    def begin(self) -> bytes:
        """Make the new directory, and return its path and what its files will carry.

        Raises:
            ValueError: naming the path that cannot be written, or the entry of the metadata that cannot be used.
        """
        self._check_metadata()
        texts = self._read_texts()
        with _writing(self._parent):
            self._parent.mkdir(parents=True, exist_ok=True)
        self._opened.enter_context(DirectoryLock(self._parent))
        self._new = self._opened.enter_context(NewDirectory(self._destination, replace=True))
        with _writing(self._destination):
            for name, content in texts.items():
                write_file(self._new.path / name, content)
        return msgspec.json.encode((str(self._new.path), self._metadata.checkpoint_id))

    def finish(self, contents: Sequence[RankContents]) -> None:
        """Describe what all ranks have written, and put it in its place.

        Raises:
            ValueError: naming the tensor that ranks have different copies of, or the path that cannot be written.
        """
        problem = unlike_copies(self._metadata.tensors, contents)
        if problem:
            raise ValueError(problem)
        files = tuple(file for each in contents for file in each.files)
        with _writing(self._destination):
            write_file(self._new.path / METADATA_FILE, replace(self._metadata, files=files).to_json())
        self._new.commit()

    def _read_texts(self) -> dict[str, bytes]:
        if self._tokenizer_files is None:
            return {}
        if not self._tokenizer_files.is_dir():
            raise ValueError(f"tokenizer_files: {self._tokenizer_files} is not a directory")
        paths = [self._tokenizer_files / name for name in TEXT_FILES]
        return {path.name: read_bytes(path) for path in paths if path.is_file()}

    def _check_metadata(self) -> None:
        """Find out now whether it can be read again, rather than when all is written."""
        metadata = self._metadata
        count = 1 + max((tensor.file_index for tensor in metadata.tensors), default=0)
        places = [(rank, index) for rank in range(metadata.tp_size) for index in range(count)]
        files = tuple(
            FileMetadata(name=file_name(rank, index, count), rank=rank, index=index, size=0, xxh3_128="")
            for rank, index in places
        )
        try:
            content = replace(metadata, files=files).to_json()
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata: {error}") from error
        CheckpointMetadata.parse(content, Path(METADATA_FILE))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error
