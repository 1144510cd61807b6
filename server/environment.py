"""What processes that are started here are told by their environment."""

import os

ENVIRONMENT_PREFIX = "RYZANSTEIN_"  # of options; see `server.options`
HUB_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")  # that its library reads


def inherited_environment() -> dict[str, str]:
    """Return ours without options: processes that are started here are told theirs, and the server's hold secrets."""
    return {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}


def engine_environment() -> dict[str, str]:
    """Return `inherited_environment` without what only a download needs to know."""
    return {name: value for name, value in inherited_environment().items() if name not in HUB_SECRETS}
