"""Logging: what is written while a request is handled carries the request's id."""

import logging
from contextvars import ContextVar

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")  # "-" outside of any request


def configure_logging(level: str) -> None:
    """Write messages from `level` on to standard error."""
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s [%(request_id)s] %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_add_request_id)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # the banner says it better


def _add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = REQUEST_ID.get()
    return True
