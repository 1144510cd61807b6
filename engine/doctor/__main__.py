"""`python -m engine.doctor SPEC`: run the engine's checks, and write an event a line, as JSON, to standard output."""

import contextlib
import logging
import os
import shutil
import sys
import threading
from pathlib import Path

import msgspec

from engine.doctor import capacity, group, machine, model, software
from engine.doctor.subject import Subject
from engine.protocol.checks import CheckEvent, run_checks
from engine.protocol.config import RankSpec


def main(spec_path: Path) -> None:
    """Run every check, until nobody hears of what is found any more."""
    logging.basicConfig(level=logging.ERROR)  # what is worth a warning is a check
    spec = msgspec.json.decode(spec_path.read_bytes(), type=RankSpec)
    run_dir = _RunDirectory(Path(spec.run_dir))
    threading.Thread(target=_end_with_standard_input, args=(run_dir,), daemon=True).start()
    try:
        with contextlib.suppress(BrokenPipeError):
            _examine(Subject(spec, spec_path))
    finally:
        run_dir.remove()


class _RunDirectory:
    """The folder of sockets. It is removed here too, since the process that made it may be gone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def remove(self) -> None:
        """Remove it under another name, so that what is still being made there no longer finds it."""
        removed = self._path.with_name(f"{self._path.name}.removed")
        with self._lock:  # this process must not end while its other thread is removing
            with contextlib.suppress(FileNotFoundError):
                self._path.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)


def _examine(subject: Subject) -> None:
    engine = subject.engine
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0) as events:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries' words are no events

        def emit(event: CheckEvent) -> None:
            events.write(msgspec.json.encode(event) + b"\n")

        run_checks(software.checks(engine), emit)
        run_checks(machine.checks(engine), emit)
        for section in (model, group, capacity):
            run_checks(section.checks(subject), emit)


def _end_with_standard_input(run_dir: _RunDirectory) -> None:
    """End when the process that started this one has closed the pipe, or is gone; the kernel then ends the ranks."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    run_dir.remove()
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
