"""When a rank counts as hung."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from engine.orchestrator import watch as watch_module
from engine.orchestrator.launcher import RankProcesses
from engine.orchestrator.watch import Watch
from engine.protocol.beats import Beats, RankBeats
from tests.service_process import wait_until

TIMEOUT = 8.0  # a look is due each second


class Scene:
    """Two ranks' processes, which do nothing, what they say, and a clock."""

    def __init__(self, beats: Beats, path: Path, ranks: RankProcesses, clock: SimpleNamespace) -> None:
        self.ranks = [RankBeats(path, rank, 2) for rank in range(2)]
        self.processes = ranks
        self.clock = clock
        self.watch = Watch(beats, ranks, 2, TIMEOUT)

    def look_for(self, seconds: float) -> str:
        """Look each second for so long; return what hangs, if anything does."""
        for _ in range(round(seconds)):
            self.clock.now += 1.0
            assert self.watch.seconds_until_due() == 0
            if (loss := self.watch.look()) is not None:
                assert loss.kind == "hung"
                return loss.cause
        return ""

    def send(self, rank: int, number: signal.Signals) -> None:
        process = psutil.Process(self.processes.pid(rank))
        process.send_signal(number)
        is_stopped = number == signal.SIGSTOP
        wait_until(lambda: (process.status() == psutil.STATUS_STOPPED) == is_stopped, 30)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(watch_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    path = tmp_path / "beats-1"
    with closing(Beats(path, 2)) as beats:
        ranks = RankProcesses(path, 2, (sys.executable, "-c", "import time; time.sleep(600)"))
        try:
            yield Scene(beats, path, ranks, clock)
        finally:
            ranks.kill()


def test_ranks_that_have_nothing_to_do_may_be_silent_for_ever(scene: Scene) -> None:
    assert scene.look_for(1000) == ""


def test_a_rank_that_gets_no_further_is_hung_when_its_time_is_over(scene: Scene) -> None:
    scene.ranks[1].beat()
    assert scene.look_for(TIMEOUT + 1) == ""
    assert scene.look_for(1) == f"rank 1 (pid {scene.processes.pid(1)}) got no further with a step within 8 s"


def test_a_long_step_that_gets_further_is_not_hung(scene: Scene) -> None:
    for _ in range(20):
        scene.ranks[0].beat()
        assert scene.look_for(TIMEOUT - 1) == ""
    scene.ranks[0].rest()
    assert scene.look_for(2 * TIMEOUT) == ""


def test_a_stopped_rank_is_hung_also_when_it_has_nothing_to_do(scene: Scene) -> None:
    scene.send(1, signal.SIGSTOP)
    assert scene.look_for(TIMEOUT + 1) == ""
    assert scene.look_for(1) == f"rank 1 (pid {scene.processes.pid(1)}) was stopped, and not continued within 8 s"


def test_a_rank_that_is_continued_in_time_is_well(scene: Scene) -> None:
    for _ in range(3):
        scene.send(0, signal.SIGSTOP)
        assert scene.look_for(TIMEOUT - 1) == ""
        scene.send(0, signal.SIGCONT)
        assert scene.look_for(1) == ""


@pytest.mark.parametrize("silent_for", [0, TIMEOUT / 2])
def test_the_stopped_rank_is_named_and_not_those_that_wait_for_it(scene: Scene, silent_for: float) -> None:
    for rank in scene.ranks:
        rank.beat()
    assert scene.look_for(silent_for) == ""
    scene.send(1, signal.SIGSTOP)
    assert scene.look_for(2 * TIMEOUT).startswith(f"rank 1 (pid {scene.processes.pid(1)}) was stopped")


def test_the_time_in_which_a_rank_is_stopped_is_no_silence_of_any(scene: Scene) -> None:
    for rank in scene.ranks:
        rank.beat()
    assert scene.look_for(TIMEOUT / 2) == ""
    scene.send(1, signal.SIGSTOP)
    assert scene.look_for(TIMEOUT - 1) == ""
    scene.send(1, signal.SIGCONT)
    assert scene.look_for(TIMEOUT / 2) == ""
    assert "got no further" in scene.look_for(2)


def test_time_in_which_nobody_could_look_does_not_count(scene: Scene) -> None:
    scene.ranks[0].beat()
    assert scene.look_for(2) == ""
    scene.clock.now += 3600  # the machine slept, and the ranks with it
    assert scene.look_for(2) == ""
    scene.ranks[0].beat()
    assert scene.look_for(TIMEOUT - 1) == ""


def test_a_process_that_is_gone_is_not_stopped(scene: Scene) -> None:
    scene.processes.kill()
    assert scene.watch.stopped() is None


def test_a_process_is_stopped_whatever_its_name_is(scene: Scene, tmp_path: Path) -> None:
    program = tmp_path / "a) T (b"
    program.symlink_to(sys.executable)
    with subprocess.Popen([program, "-c", "import time; time.sleep(600)"]) as process:
        try:
            odd = Watch(scene.watch._beats, SimpleNamespace(pid=lambda _: process.pid), 1, TIMEOUT)
            wait_until(lambda: psutil.Process(process.pid).name().startswith("a)"), 30)
            assert odd.stopped() is None
        finally:
            process.kill()
