"""The HTTP side's options: one definition of each name, default and help text, as in `engine.protocol.config`."""

import os
from dataclasses import dataclass, fields
from pathlib import Path

from engine.protocol.config import EMBEDDED_MODEL, option

EMBEDDED_MODEL_NAME = "ryzanstein-embedded"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where and how the API is served.

    Raises:
        ValueError: naming the option, when a value is out of range.
    """

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 takes requests from other machines")
    port: int = option(8000, "TCP port to listen on; 0 picks a free one")
    served_model_name: str | None = option(None, "the model's name in the API; the directory's name when left out")
    chat_template: str | None = option(None, "file with a Jinja chat template to use instead of the model's own")
    seed: int | None = option(
        None, "makes requests without a seed repeatable: theirs are drawn from this one, in order of arrival"
    )
    access_log: bool = option(True, "write one line for each request, without its body")
    log_level: str = option("info", "least important messages to write", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"--{item.name.replace('_', '-')} must be one of {', '.join(choices)}, not {value!r}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port must be between 0 and 65535, not {self.port}")
        if self.served_model_name == "":
            raise ValueError("--served-model-name must not be empty")

    def model_name(self, model: str) -> str:
        """Return the name under which the API offers the model in directory `model`."""
        if self.served_model_name is not None:
            return self.served_model_name
        if Path(model).resolve() == EMBEDDED_MODEL.resolve():
            return EMBEDDED_MODEL_NAME
        # As it is written: a link is often the name, and what it leads to a hash.
        return Path(os.path.normpath(Path(model).absolute())).name
