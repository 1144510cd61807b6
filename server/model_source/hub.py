"""Models on the hub: what of them is here, and how they get here. The work is done by a process that can be killed."""

import contextlib
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from engine.protocol.errors import TransientError
from server.environment import inherited_environment
from server.logs import is_json
from server.model_source.config import ModelSourceConfig
from server.model_source.hub_messages import (
    HubDescribed,
    HubDone,
    HubEvent,
    HubFailed,
    HubProgress,
    HubRequest,
    HubTask,
    HubTexts,
    HubWarning,
)
from server.model_source.progress import DownloadProgress
from server.signals import stop_signals_delayed

HUB_PROCESS = (sys.executable, "-P", "-m", "server.model_source.hub_process")
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "critical", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}

logger = logging.getLogger(__name__)


class NotDownloadedError(ValueError):
    """The model is not on this machine, and the hub was not asked."""


def download(model: str, config: ModelSourceConfig, check: Callable[[Path], object]) -> Path:
    """Return the directory of a model of the hub, downloading what of it is not here.

    Args:
        model: its name on the hub.
        config: which version of it, where to, and whether the hub may be asked.
        check: gets the directory as soon as all but the weights is in it; what it raises ends the download.

    Raises:
        ValueError: in one line, what is missing: the model, the revision, a token, or room.
        TransientError: in one line, why the hub or the disk does not give it now.
    """
    progress = DownloadProgress(model)
    with contextlib.closing(progress), _events(HubTask.DOWNLOAD, model, config) as events:
        for event in events:
            if isinstance(event, HubProgress):
                progress.take(event)
            elif isinstance(event, HubTexts):
                check(Path(event.directory))
            elif isinstance(event, HubWarning):
                logger.warning("%s", event.text)
            else:
                return _directory(event)
    raise TransientError(f"model: {model}: the download ended without a word")


def find(model: str, config: ModelSourceConfig) -> Path:
    """Return the directory of a model of the hub that was downloaded before.

    Raises:
        NotDownloadedError: if it was not.
        ValueError: naming the file that cannot be used.
    """
    with _events(HubTask.FIND, model, config) as events:
        return _directory([*events][-1])


def describe(model: str, config: ModelSourceConfig) -> HubDescribed:
    """Ask the hub what would be downloaded.

    Raises:
        ValueError: in one line, what is missing: the model, the revision, a token or the hub; TransientError where it
            may be there soon.
    """
    with _events(HubTask.DESCRIBE, model, config) as events:
        last = [*events][-1]
    if isinstance(last, HubDescribed):
        return last
    _directory(last)
    raise AssertionError("what is described is not downloaded")


def _directory(event: HubEvent) -> Path:
    if isinstance(event, HubFailed):
        raise _kind_of(event)(event.error)
    assert isinstance(event, HubDone)
    return Path(event.directory)


def _kind_of(failed: HubFailed) -> type[ValueError]:
    if failed.is_absent:
        return NotDownloadedError
    return TransientError if failed.is_transient else ValueError


@contextlib.contextmanager
def _events(task: HubTask, model: str, config: ModelSourceConfig) -> Iterator[Iterator[HubEvent]]:
    """Start the process, and give what it tells; it is gone after the block."""
    request = HubRequest(
        task=task,
        model=model,
        revision=config.revision,
        token=config.hf_token,
        download_dir=config.download_dir,
        offline=config.offline,
        is_json_log=is_json(),
    )
    with contextlib.ExitStack() as ending:
        with stop_signals_delayed():  # there is no moment at which the process runs and nobody would end it
            process = subprocess.Popen(
                HUB_PROCESS,
                env={**inherited_environment(), **QUIET},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # a terminal's Ctrl-C is this process's to answer
            )
            ending.callback(_end, process)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(request) + b"\n")
        process.stdin.flush()
        decoder = msgspec.json.Decoder(HubEvent)
        yield (decoder.decode(line) for line in process.stdout)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with contextlib.suppress(BrokenPipeError):
            stream.close()
