"""What goes wrong between here and the hub, in one line that says what to do about it."""

import errno

from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from engine.protocol.errors import is_passing
from server.model_source.hub_messages import HubRequest

TOKEN_SOURCES = "--hf-token, HF_TOKEN or the hub's own login"
_HTTP_LIBRARIES = ("httpx", "httpx2")  # that huggingface_hub has used


def describe(error: Exception, request: HubRequest, folder: str) -> str:
    """Return `error` in one line. `folder` is the cache that is written to."""
    text = _describe_refusal(error, request) or _describe_disk(error, folder)
    if text is None and is_unreachable(error):
        text = f"the hub, {ENDPOINT}, cannot be reached ({_first_line(error)})"
    elif text is None:
        text = f"{request.model}: {type(error).__name__}: {_first_line(error)}"
    return f"model: {text}"


def is_unreachable(error: Exception) -> bool:
    """Return whether there was no answer, or one that says that the hub is out of order."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    if isinstance(error, LocalEntryNotFoundError):  # the library's word for it
        return True
    return type(error).__module__.partition(".")[0] in _HTTP_LIBRARIES


def is_transient(error: Exception) -> bool:
    """Return whether another try may go well: not after a refusal, nor where the disk takes nothing."""
    if isinstance(error, OSError) and error.errno is not None:
        return is_passing(error)
    return is_unreachable(error) or not isinstance(error, HfHubHTTPError | ValueError)


def _describe_refusal(error: Exception, request: HubRequest) -> str | None:
    """Return what the hub does not give, or None if that is not it."""
    model = request.model
    if isinstance(error, GatedRepoError):
        return f"{model} is gated: ask for access at {ENDPOINT}/{model}, and give a token that has it ({TOKEN_SOURCES})"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{model} is no directory, and no model on the hub, {ENDPOINT}; one that is private takes a token "
            f"({TOKEN_SOURCES})"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{model} has no revision {request.revision or 'main'} on the hub, {ENDPOINT}"
    if isinstance(error, DisabledRepoError):
        return f"{model} is disabled on the hub, {ENDPOINT}"
    if isinstance(error, HFValidationError):
        return f"{model} is no directory, and no name on the hub can be like that"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"the hub, {ENDPOINT}, does not take the token for {model} ({TOKEN_SOURCES})"
    return None


def _describe_disk(error: Exception, folder: str) -> str | None:
    if isinstance(error, HfHubHTTPError | LocalEntryNotFoundError) or not isinstance(error, OSError):
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{folder}: {error.strerror}; what was downloaded stays for the next start (--download-dir, HF_HOME)"
    if error.errno is not None and error.strerror is not None:
        return f"{error.filename or folder}: {error.strerror} (--download-dir, HF_HOME)"
    return None


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
