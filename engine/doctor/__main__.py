"""`python -m engine.doctor SPEC`: run the engine's checks, and write an event a line, as JSON, to standard output."""

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
    """Run every check."""
    logging.basicConfig(level=logging.ERROR)  # what is worth a warning is a check
    spec = msgspec.json.decode(spec_path.read_bytes(), type=RankSpec)
    threading.Thread(target=_end_with_standard_input, args=(spec.run_dir,), daemon=True).start()
    subject = Subject(spec, spec_path)
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0) as events:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries' words are no events

        def emit(event: CheckEvent) -> None:
            events.write(msgspec.json.encode(event) + b"\n")

        run_checks(software.checks(spec.engine), emit)
        run_checks(machine.checks(spec.engine), emit)
        for section in (model, group, capacity):
            run_checks(section.checks(subject), emit)


def _end_with_standard_input(run_dir: str) -> None:
    """End when the process that started this one has closed the pipe, or is gone; the kernel then ends the ranks."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    shutil.rmtree(run_dir, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
