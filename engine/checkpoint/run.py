"""The commands of `ryzanstein checkpoint`: what each shows, and returns as its exit code."""

import os
import sys
import time
from pathlib import Path

import msgspec

from engine.checkpoint.contents import contents_of
from engine.checkpoint.convert import shard
from engine.checkpoint.export import export
from engine.checkpoint.progress_bar import shown_progress
from engine.checkpoint.table import harmless, table_of
from engine.checkpoint.verify import Verdict, verify
from engine.command.output import say
from engine.command.stop_request import StopRequest
from engine.protocol.commands import ExportCommand, InspectCommand, ShardCommand, VerifyCommand
from engine.protocol.model_directory import find_model_directory
from engine.protocol.units import format_bytes, format_seconds

EXIT_OK, EXIT_PROBLEMS = 0, 2
NARROWEST = 40  # columns; on a terminal that has fewer, lines go on in the next

Command = ShardCommand | InspectCommand | VerifyCommand | ExportCommand


def run(command: Command, stop: StopRequest) -> int:
    """Run a command and return the exit code.

    Raises:
        ValueError: in one line, what of a user's it cannot go on with.
        Stopped: when a stop signal came.
        BrokenPipeError: if nobody reads standard output.
    """
    match command:
        case ShardCommand():
            return _shard(command, stop)
        case ExportCommand():
            return _export(command, stop)
        case InspectCommand():
            return _inspect(command)
        case VerifyCommand():
            return _verify(command, stop)


def _shard(command: ShardCommand, stop: StopRequest) -> int:
    began = time.monotonic()
    with shown_progress("writing", is_shown=command.progress, check=stop.check) as progress:
        metadata = shard(command, progress.start)
    if command.progress:
        size = sum(file.size for file in metadata.files)
        ranks = _counted(metadata.tp_size, "rank")
        say(_done(f"for {ranks}", command.destination, len(metadata.files), size, time.monotonic() - began))
    return EXIT_OK


def _export(command: ExportCommand, stop: StopRequest) -> int:
    began = time.monotonic()
    with shown_progress("writing", is_shown=command.progress, check=stop.check) as progress:
        names = export(command, progress.start)
    if command.progress:
        size = sum((Path(command.destination) / name).stat().st_size for name in names)
        say(_done("as Hugging Face has them", command.destination, len(names), size, time.monotonic() - began))
    return EXIT_OK


def _done(kind: str, destination: str, num_files: int, size: int, seconds: float) -> str:
    files = _counted(num_files, "file")
    return f"{destination}: {files} {kind}, {format_bytes(size)}, written in {format_seconds(seconds)}\n"


def _inspect(command: InspectCommand) -> int:
    contents = contents_of(find_model_directory(command.path))
    if command.json:
        say(contents.to_json())
        return EXIT_OK
    say(table_of(contents, width=_columns(), is_unicode=_can_show("…")))
    return EXIT_OK


def _columns() -> int | None:
    """Return how wide the terminal is; None where there is none, or it does not know."""
    if sys.stdout is None or not sys.stdout.isatty():
        return None
    columns = os.get_terminal_size(sys.stdout.fileno()).columns
    return max(NARROWEST, columns) if columns else None


def _verify(command: VerifyCommand, stop: StopRequest) -> int:
    began = time.monotonic()
    with shown_progress("verifying", is_shown=command.progress, check=stop.check) as progress:
        verdict = verify(find_model_directory(command.path), progress.start)
    seconds = time.monotonic() - began
    say(_verdict_json(verdict, seconds) if command.json else _verdict_text(verdict, seconds))
    return EXIT_PROBLEMS if verdict.problems else EXIT_OK


def _verdict_json(verdict: Verdict, seconds: float) -> str:
    document = {
        "path": str(verdict.directory),
        "is_whole": not verdict.problems,
        "files": verdict.num_files,
        "bytes": verdict.num_bytes,
        "problems": verdict.problems,
        "notes": verdict.notes,
        "seconds": seconds,
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n"


def _verdict_text(verdict: Verdict, seconds: float) -> str:
    lines = [f"problem: {problem}" for problem in verdict.problems] + [f"note: {note}" for note in verdict.notes]
    found = _counted(len(verdict.problems), "problem") if verdict.problems else "no problem"
    size = f"{_counted(verdict.num_files, 'file')}, {format_bytes(verdict.num_bytes)}"
    lines.append(f"{verdict.directory}: {found}; {size}, in {format_seconds(seconds)}")
    return "\n".join(map(harmless, lines)) + "\n"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _can_show(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, AttributeError):
        return False
    return True
