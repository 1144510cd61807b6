import os
import tempfile
import threading
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


def test_a_process_that_was_stopped_leaves_no_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.launch.STOP_SECONDS", 60)
    process = EngineProcess(EngineConfig(), command=("cat",))
    assert list(folder.iterdir()) == [process.run_dir]
    process.stop()
    process.stop()
    assert process.wait() == 0
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="there is one CPU")
def test_another_process_may_run_where_the_first_could(folder: Path) -> None:
    cpus = os.sched_getaffinity(0)
    process = EngineProcess(EngineConfig(), command=("sh", "-c", "exec cat"))
    try:
        os.sched_setaffinity(0, {min(cpus)})  # as the server does once it is ready
        restarting = threading.Thread(target=process.restart, args=(2, None, None))
        restarting.start()
        restarting.join()
        assert os.sched_getaffinity(process.pid) == cpus
        assert os.sched_getaffinity(0) == {min(cpus)}
    finally:
        os.sched_setaffinity(0, cpus)
        process.stop()
    assert list(folder.iterdir()) == []


def test_nothing_is_started_after_the_end(folder: Path) -> None:
    process = EngineProcess(EngineConfig(), command=("sh", "-c", "exec cat"))
    process.stop()
    pid = process.pid
    process.restart(2, None, None)
    assert process.pid == pid
    assert list(folder.iterdir()) == []
