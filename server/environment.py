"""What processes that are started here are told by their environment."""

import os

ENVIRONMENT_PREFIX = "RYZANSTEIN_"  # of options; see `server.options`
HUB_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")  # that its library reads

TRACE_SECRETS = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")  # that the exporter reads


def inherited_environment() -> dict[str, str]:
    """Return ours without options: processes that are started here are told theirs, and the server's hold secrets."""
    return {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}


def engine_environment() -> dict[str, str]:
    """Return `inherited_environment` without what only a download, or the server, needs to know."""
    secrets = (*HUB_SECRETS, *TRACE_SECRETS)
    return {name: value for name, value in inherited_environment().items() if name not in secrets}
