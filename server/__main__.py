"""`ryzanstein`, and `python -m server`: begins with what takes longest, and goes on in `server.cli`."""

import contextlib
import sys
from collections.abc import Sequence

from engine.protocol.errors import EXIT_INTERRUPTED
from engine.protocol.open_files import raise_open_files_limit
from server.early_engine import EarlyEngine
from server.signals import StopRequested, ignore_stop_signals, on_stop_signal, stop_signals_delayed, unwind

EXIT_STOPPED = 0


def main() -> int:
    """Run the command line and return the exit code; a service's engine starts before the rest is even imported."""
    on_stop_signal(unwind)
    serves = will_serve(sys.argv[1:])
    raise_open_files_limit()
    with contextlib.ExitStack() as ending:
        ending.callback(ignore_stop_signals)
        try:
            engine = _start_early(ending) if serves else None
            from server import cli  # noqa: PLC0415  (takes long)

            return cli.main(engine=engine)
        except StopRequested:
            return EXIT_STOPPED if serves else EXIT_INTERRUPTED


def will_serve(arguments: Sequence[str]) -> bool:
    """Return whether a command line is one that starts an engine, unless something is wrong with it."""
    return list(arguments[:1]) == ["serve"] and not {"-h", "--help"} & set(arguments)


def _start_early(ending: contextlib.ExitStack) -> EarlyEngine | None:
    """Start the engine's process; None where that cannot be done, which the command will find, too, and tell."""
    with contextlib.suppress(OSError), stop_signals_delayed():
        engine = EarlyEngine()
        ending.callback(engine.stop)
        return engine
    return None


if __name__ == "__main__":
    sys.exit(main())
