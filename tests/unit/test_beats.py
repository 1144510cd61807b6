"""How far each rank has come, as the orchestrator sees it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from engine.protocol.beats import STEP_BYTES, Beats, RankBeats

DIE_IN_A_STEP = """
import os, signal, sys
from pathlib import Path
from engine.protocol.beats import RankBeats
beats = RankBeats(Path(sys.argv[1]), 0, 3)
beats.begin_step(["a", "b"])
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def beats(tmp_path: Path) -> Iterator[Beats]:
    with closing(Beats(tmp_path / "beats-1", 3)) as beats:
        yield beats


def rank_beats(tmp_path: Path, rank: int) -> RankBeats:
    return RankBeats(tmp_path / "beats-1", rank, 3)


def test_each_rank_tells_of_itself_alone(beats: Beats, tmp_path: Path) -> None:
    assert [beats.last(rank) for rank in range(3)] == [0, 0, 0]
    rank = rank_beats(tmp_path, 1)
    rank.beat()
    first = beats.last(1)
    rank.beat()
    assert beats.last(1) > first > 0
    assert [beats.last(rank) for rank in (0, 2)] == [0, 0]
    rank.rest()
    assert beats.last(1) == 0


def test_what_a_killed_rank_was_doing_is_known(beats: Beats, tmp_path: Path) -> None:
    program = [sys.executable, "-c", DIE_IN_A_STEP, str(tmp_path / "beats-1")]
    assert subprocess.run(program, check=False).returncode == -signal.SIGKILL
    assert beats.last(0) > 0
    assert beats.step() == ["a", "b"]


def test_a_step_that_was_applied_is_none(beats: Beats, tmp_path: Path) -> None:
    rank = rank_beats(tmp_path, 0)
    assert beats.step() == []
    rank.begin_step(["a"])
    rank.end_step()
    assert beats.step() == []


def test_a_step_has_as_many_requests_as_it_likes(beats: Beats, tmp_path: Path) -> None:
    rank = rank_beats(tmp_path, 0)
    many = [f"request-{index}" for index in range(STEP_BYTES)]
    rank.begin_step(many)
    assert beats.step() == many
    rank.begin_step(["few"])
    assert beats.step() == ["few"]


def test_the_next_epochs_ranks_begin_with_nothing(beats: Beats, tmp_path: Path) -> None:
    rank = rank_beats(tmp_path, 0)
    rank.begin_step(["a"])
    beats.pass_on(tmp_path / "beats-2")
    assert (beats.last(0), beats.step()) == (0, [])
    RankBeats(tmp_path / "beats-2", 2, 3).beat()
    assert beats.last(2) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["beats-2"]


def test_a_file_that_was_cleaned_up_is_made_anew(beats: Beats, tmp_path: Path) -> None:
    (tmp_path / "beats-1").unlink()
    beats.pass_on(tmp_path / "beats-2")
    RankBeats(tmp_path / "beats-2", 0, 3).begin_step(["a"])
    assert beats.step() == ["a"]


def test_a_folder_that_was_cleaned_up_is_named_and_the_end_is_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with closing(Beats(folder / "beats-1", 3)) as beats:
        (folder / "beats-1").unlink()
        folder.rmdir()
        with pytest.raises(FileNotFoundError, match="beats-2"):
            beats.pass_on(folder / "beats-2")


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    Beats(tmp_path / "beats-1", 70).close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_rank_that_ran_wild_wrote_is_no_step(beats: Beats, tmp_path: Path) -> None:
    rank_beats(tmp_path, 0).begin_step(["a"])
    for length in (-1, 2**62):
        with (tmp_path / "beats-1").open("r+b") as file:
            file.seek(os.sysconf("SC_PAGE_SIZE"))
            file.write(length.to_bytes(8, "little", signed=True) + b"\xc1\xc1")
        assert beats.step() == []
