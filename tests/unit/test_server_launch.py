import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.protocol.config import EngineConfig
from server.launch import EngineProcess


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders are made; its path is short enough for the sockets in them."""
    with tempfile.TemporaryDirectory(prefix="launch-", dir="/tmp") as path:
        monkeypatch.setattr("tempfile.tempdir", path)
        yield Path(path)


def test_a_process_that_cannot_be_started_leaves_no_folder(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        EngineProcess(EngineConfig(), command=("/nowhere/python",))
    assert list(folder.iterdir()) == []


def test_a_process_that_was_stopped_leaves_no_folder(folder: Path) -> None:
    process = EngineProcess(EngineConfig(), command=("cat",))
    assert list(folder.iterdir()) == [process.run_dir]
    process.stop()
    process.stop()
    assert process.wait() == 0
    assert list(folder.iterdir()) == []
