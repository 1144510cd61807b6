"""Shows how far a download has come: a bar on a terminal, a line of the log now and then elsewhere."""

import logging
import os
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from engine.protocol.units import format_bytes
from server.logs import is_json
from server.model_source.hub_messages import HubProgress

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_SECONDS = 5.0  # between two lines of the log

logger = logging.getLogger(__name__)


class DownloadProgress:
    """Takes `HubProgress` events of one model; nothing is shown when there are none."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._is_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not is_json()
        self._bar: tqdm[NoReturn] | None = None
        self._shown_at = -LINE_SECONDS

    def take(self, progress: HubProgress) -> None:
        """Show it, if it is time."""
        if self._is_terminal:
            self._draw(progress)
        elif progress.done == progress.total or time.monotonic() >= self._shown_at + LINE_SECONDS:
            self._shown_at = time.monotonic()
            logger.info(
                "downloading %s: %s of %s in %d file(s)",
                self._model,
                format_bytes(progress.done),
                format_bytes(progress.total),
                progress.num_files,
            )

    def _draw(self, progress: HubProgress) -> None:
        bar = self._bar = self._bar or self._new_bar(progress)
        bar.update(progress.done - bar.n)
        bar.refresh()

    def _new_bar(self, progress: HubProgress) -> "tqdm[NoReturn]":
        from tqdm import tqdm  # noqa: PLC0415  (a start without a bar does not wait for it)

        return tqdm(
            desc=self._model,
            total=progress.total,
            initial=progress.done,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            dynamic_ncols=True,
        )

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
