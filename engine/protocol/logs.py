"""Logs as machines read them: one JSON object a line, alike from every process of a service."""

import json
import logging
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")

_unraised = logging.getLogger("ryzanstein.unhandled")


@dataclass(frozen=True)
class LogConfig:
    """What processes write to standard error, and how."""

    level: str = "info"  # one of LOG_LEVELS: the least important messages that are written
    format: str = "text"  # one of LOG_FORMATS

    @property
    def is_json(self) -> bool:
        """Whether each line is a JSON object."""
        return self.format == "json"


def fields_of(**fields: Any) -> dict[str, Any]:
    """Return the `extra` of a logging call whose record has `fields` of its own where the log is JSON."""
    return {"fields": fields}


class JSONFormatter(logging.Formatter):
    """Writes a record as a JSON object in one line.

    `timestamp` (RFC 3339, UTC, milliseconds), `level`, `logger` and `message`, then what is the same for all of this
    process, then the record's own fields, then `exception` with its traceback if there is one.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """Prepare it; `fields` say which process writes."""
        super().__init__()
        self._fields = dict(fields)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "timestamp": time.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._fields,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return json.dumps(line, default=str)


def write_json(level: str, **fields: Any) -> None:
    """Have this process write its log as JSON from `level` on, with what else Python would write to standard error.

    That is warnings, and exceptions that nobody catches. `fields` are added to each line.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter(fields))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_of_thread
    sys.unraisablehook = _log_unraisable


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    _unraised.critical("%s: %s", kind.__name__, error, exc_info=(kind, error, traceback))


def _log_uncaught_of_thread(arguments: threading.ExceptHookArgs) -> None:
    error = arguments.exc_value
    if error is not None and not isinstance(error, SystemExit):
        _unraised.error("in thread %s: %s", arguments.thread and arguments.thread.name, error, exc_info=error)


def _log_unraisable(arguments: "sys.UnraisableHookArgs") -> None:
    message = arguments.err_msg or "exception ignored in"
    _unraised.error("%s: %r", message, arguments.object, exc_info=arguments.exc_value)
