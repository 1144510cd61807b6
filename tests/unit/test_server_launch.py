from pathlib import Path

import pytest

from engine.protocol.config import EngineConfig
from server.launch import EngineProcess


def test_a_process_that_cannot_be_started_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(FileNotFoundError):
        EngineProcess(EngineConfig(), command=("/nowhere/python",))
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_stopped_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    process = EngineProcess(EngineConfig(), command=("cat",))
    process.stop()
    process.stop()
    assert process.wait() == 0
    assert list(tmp_path.iterdir()) == []
