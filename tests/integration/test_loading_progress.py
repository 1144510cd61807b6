"""What the server hears while ranks load: a real orchestrator over ranks that load by a script."""

import threading
import time
from pathlib import Path

import pytest

from engine.orchestrator.loading import REPORT_INTERVAL
from engine.protocol.config import EMBEDDED_MODEL, EngineConfig
from engine.protocol.messages import GroupState
from tests.engine_process import EngineFailedError, EngineProcess
from tests.loading_group import FOLDER_VARIABLE, UNIT

RANKS = 8
TOTAL = sum((rank + 1) * UNIT for rank in range(RANKS))
LOADING_SECONDS = 2.0


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineProcess:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    config = EngineConfig(model=str(EMBEDDED_MODEL), tensor_parallel_size=RANKS, device="cpu")
    return EngineProcess(config, command=("-m", "tests.loading_group"))


def test_the_server_hears_the_ranks_sums_and_is_not_flooded(group: EngineProcess, tmp_path: Path) -> None:
    def let_it_finish() -> None:
        group.wait_until_heard(lambda status: status.total_bytes == TOTAL)
        before = group.statuses[-1].loaded_bytes
        group.wait_until_heard(lambda status: status.loaded_bytes > before)
        time.sleep(LOADING_SECONDS)
        (tmp_path / "finish").touch()

    finishing, began = threading.Thread(target=let_it_finish), time.monotonic()
    finishing.start()
    with group:
        elapsed = time.monotonic() - began
    finishing.join()
    heard = [status for status in group.statuses if status.total_bytes]
    assert all(status.state is GroupState.STARTING for status in heard)
    totals = [status.total_bytes for status in heard]
    assert totals == sorted(totals)
    loaded = [status.loaded_bytes for status in heard]
    assert loaded == sorted(loaded)
    assert all(status.total_bytes <= 2 * status.loaded_bytes for status in heard)
    assert (loaded[-1], totals[-1]) == (TOTAL, TOTAL)
    # One an interval, one for each rank that is complete while all that were heard are, and one for the last HELLO.
    assert len(heard) <= elapsed / REPORT_INTERVAL + RANKS + 1
    assert group.statuses[-1].state is GroupState.READY


def test_the_last_words_of_ranks_that_fall_silent_are_heard(group: EngineProcess, tmp_path: Path) -> None:
    def let_it_stall() -> None:
        group.wait_until_heard(lambda status: status.total_bytes == TOTAL)
        (tmp_path / "stall").touch()
        group.wait_until_heard(lambda status: status.loaded_bytes == TOTAL - RANKS)
        (tmp_path / "finish").touch()

    stalling = threading.Thread(target=let_it_stall)
    stalling.start()
    with group:
        pass
    stalling.join()


def test_ranks_that_die_again_and_again_while_they_load_end_the_group_with_a_name(
    group: EngineProcess, tmp_path: Path
) -> None:
    def let_it_die() -> None:
        group.wait_until_heard(lambda status: status.total_bytes > 0)
        (tmp_path / "die").touch()

    dying = threading.Thread(target=let_it_die)
    dying.start()
    with pytest.raises(EngineFailedError, match=r"rank \d .* was killed by SIGKILL"), group:
        pass
    dying.join()
    assert [status.state for status in group.statuses[-2:]] == [GroupState.RECOVERING, GroupState.FAILED]
