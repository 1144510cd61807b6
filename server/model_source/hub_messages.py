"""What a service asks of the process that talks to the hub, and what that answers: a line of JSON each."""

from enum import StrEnum

import msgspec


class HubTask(StrEnum):
    """What is to be done."""

    DOWNLOAD = "download"  # what is not here yet
    FIND = "find"  # what is here
    DESCRIBE = "describe"  # say what there is to be downloaded


class HubRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Which model, and where it is to be. It goes through a pipe: other users can read command lines."""

    task: HubTask
    model: str
    revision: str | None = None
    token: str | None = None
    download_dir: str | None = None
    offline: bool = False
    is_json_log: bool = False  # whether what it writes to standard error are JSON objects


class HubTexts(msgspec.Struct, frozen=True, tag="texts"):
    """All but the weights is in `directory`."""

    directory: str


class HubProgress(msgspec.Struct, frozen=True, tag="progress"):
    """So many bytes of weights are here."""

    done: int
    total: int
    num_files: int


class HubDone(msgspec.Struct, frozen=True, tag="done"):
    """The whole model is in `directory`."""

    directory: str


class HubDescribed(msgspec.Struct, frozen=True, tag="described"):
    """The hub has the model: so many bytes in so many files would be downloaded."""

    endpoint: str
    size: int
    num_files: int


class HubWarning(msgspec.Struct, frozen=True, tag="warning"):
    """What whoever runs the service should know."""

    text: str


class HubFailed(msgspec.Struct, frozen=True, tag="failed"):
    """Nothing comes of it. `is_absent`: the model is not here, and the hub was not asked."""

    error: str
    is_absent: bool = False
    is_transient: bool = False  # another try may go well


HubEvent = HubTexts | HubProgress | HubDone | HubDescribed | HubWarning | HubFailed
