"""A plugin of coverage.py for processes that are killed, as ranks are: saves what was measured twice a second.

It is loaded in each measured process (`[tool.coverage.run]` in pyproject.toml), and no part of the product knows of it.
Without it only processes that end by themselves would count.
"""

import atexit
import threading

import coverage
from coverage.plugin_support import Plugins
from coverage.types import TConfigurable

SECONDS = 0.5


class _Saver(coverage.CoveragePlugin):
    """Starts the thread once the options are known."""

    def configure(self, config: TConfigurable) -> None:
        if config.get_option("run:parallel"):  # measuring, not reporting
            ending = threading.Event()
            thread = threading.Thread(target=_save_again_and_again, args=(ending,), name="coverage", daemon=True)
            thread.start()
            atexit.register(_stop, ending, thread)


def _stop(ending: threading.Event, thread: threading.Thread) -> None:
    """No thread may save while the interpreter is being taken apart: that crashed."""
    ending.set()
    thread.join()


def _save_again_and_again(ending: threading.Event) -> None:
    while not ending.wait(SECONDS):
        measuring = coverage.Coverage.current()
        if measuring is not None:
            measuring.save()


def coverage_init(reg: Plugins, options: dict[str, object]) -> None:  # noqa: ARG001
    """Register the plugin."""
    reg.add_configurer(_Saver())
