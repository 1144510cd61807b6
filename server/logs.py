"""Logging: what is written while a request is handled carries the request's id, and its trace's where there is one."""

import logging
import sys
from contextvars import ContextVar

from engine.protocol.logs import JSONFormatter, LogConfig, fields_of, write_json

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")  # "-" outside of any request
TRACE_ID: ContextVar[str] = ContextVar("trace_id", default="")  # 32 hexadecimal digits; nothing outside of any trace

logger = logging.getLogger("ryzanstein")


def configure_logging(log: LogConfig) -> None:
    """Write messages to standard error, as `log` says."""
    if log.is_json:
        write_json(log.level, process="server")
    else:
        line = "%(asctime)s %(levelname)s [%(request_id)s] %(message)s"
        logging.basicConfig(level=log.level.upper(), format=line)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_add_ids)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # the banner says it better


def tell(level: int, message: str) -> None:
    """Say what concerns the process as a whole: in a line as all commands write it, or as a record of a JSON log."""
    if is_json():
        logger.log(level, "%s", message)
    else:
        sys.stderr.write(f"ryzanstein: {logging.getLevelName(level).lower()}: {message}\n")


def is_json() -> bool:
    """Return whether this process's log is JSON."""
    return any(isinstance(handler.formatter, JSONFormatter) for handler in logging.getLogger().handlers)


def _add_ids(record: logging.LogRecord) -> bool:
    request_id, trace_id = REQUEST_ID.get(), TRACE_ID.get()
    ids = {} if request_id == "-" else {"request_id": request_id}
    if trace_id:
        ids["trace_id"] = trace_id
    record.__dict__ |= {"request_id": request_id, **fields_of(**{**ids, **getattr(record, "fields", {})})}
    return True
