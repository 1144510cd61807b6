"""How loading shows: on a pseudo-terminal as a person sees it, and in the log where there is no terminal."""

import io
import logging
import os
from collections.abc import Iterator

import pytest

from engine.protocol.messages import GroupState, GroupStatus
from server.loading_progress import LINE_INTERVAL, LoadingProgress
from tests.terminal import Terminal
from tests.unit.server_support import ServerLog, wait_until

GIB = 2**30


class Clock:
    """A monotonic clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("server.loading_progress.time.monotonic", clock)
    return clock


def starting(loaded_bytes: int, total_bytes: int = 8 * GIB) -> GroupStatus:
    return GroupStatus(epoch=1, state=GroupState.STARTING, loaded_bytes=loaded_bytes, total_bytes=total_bytes)


READY = GroupStatus(epoch=1, state=GroupState.READY)
FAILED = GroupStatus(epoch=1, state=GroupState.FAILED, error="no")


class Screen:
    """Progress on a terminal, and others that write there."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self.stream = open(terminal.end, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  (the fixture closes it)
        self.progress = LoadingProgress(self.stream)

    def write(self, text: str) -> None:
        os.write(self._terminal.end, text.encode())

    def shows(self, *lines: str, ends_in: str = "") -> bool:
        """Whether just these lines show soon, the bar up to where it ends here, and the last ending in `ends_in`."""

        def is_so() -> bool:
            shown = [line for line in self._terminal.screen if line]
            if len(shown) != len(lines) or not shown[-1].endswith(ends_in):
                return False
            return all(
                there.startswith(line) if line.startswith("loading") else there == line
                for there, line in zip(shown, lines, strict=True)
            )

        assert wait_until(is_so), self._terminal.screen
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    monkeypatch.setenv("TERM", "xterm")
    with Terminal() as terminal:
        screen = Screen(terminal)
        yield screen
        screen.progress.close()
        screen.stream.close()


def test_a_bar_shows_the_share_and_the_bytes(screen: Screen, clock: Clock) -> None:
    screen.progress.follow(starting(0))
    assert screen.shows("loading weights:   0%|")
    clock.now += 2
    screen.progress.follow(starting(2 * GIB))
    assert screen.shows("loading weights:  25%|")
    assert screen.shows("loading weights:  25%|", ends_in="| 2.0 GiB of 8.0 GiB [00:02<00:06, 1.07GB/s]")


@pytest.mark.parametrize("end", [READY, FAILED])
def test_nothing_is_left_of_the_bar_when_loading_ends(screen: Screen, end: GroupStatus) -> None:
    screen.write("before\n")
    screen.progress.follow(starting(GIB))
    assert screen.shows("before", "loading weights:  12%|")
    screen.progress.follow(end)
    screen.write("after\n")
    assert screen.shows("before", "after")


def test_nothing_shows_after_the_close(screen: Screen) -> None:
    screen.progress.follow(starting(GIB))
    screen.progress.close()
    screen.progress.follow(starting(2 * GIB))
    screen.write("the end\n")
    assert screen.shows("the end")


def test_a_later_group_shows_its_loading_too(screen: Screen) -> None:
    screen.progress.follow(starting(GIB))
    screen.progress.follow(READY)
    screen.progress.follow(starting(4 * GIB))
    assert screen.shows("loading weights:  50%|")


def test_a_line_that_a_rank_writes_stands_alone_above_the_bar(screen: Screen) -> None:
    screen.progress.follow(starting(GIB))
    screen.write("WARNING rank 1: a line\n")
    screen.progress.follow(starting(2 * GIB))
    assert screen.shows("WARNING rank 1: a line", "loading weights:  25%|")


def test_lines_of_the_log_stand_alone_above_the_bar(screen: Screen) -> None:
    handler, root = logging.StreamHandler(screen.stream), logging.getLogger()
    root.addHandler(handler)
    try:
        screen.progress.follow(starting(GIB))
        for number in range(3):
            logging.getLogger("server").warning("line %d", number)
        assert screen.shows("line 0", "line 1", "line 2")
        screen.progress.follow(starting(2 * GIB))
        assert screen.shows("line 0", "line 1", "line 2", "loading weights:  25%|")
        screen.progress.follow(READY)
        assert handler.filters == []
    finally:
        root.removeHandler(handler)


@pytest.mark.parametrize("columns", [20, 40, 200])
def test_the_bar_never_needs_a_second_line(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with Terminal(columns) as terminal:
        screen = Screen(terminal)
        screen.progress.follow(starting(GIB))
        assert screen.shows("loading weights:  12"[: columns - 1])
        assert max(map(len, terminal.screen)) < columns
        screen.progress.close()
        screen.stream.close()


def test_a_terminal_that_is_gone_does_not_end_the_loading() -> None:
    with Terminal() as terminal:
        screen = Screen(terminal)
        screen.progress.follow(starting(GIB))
        nowhere = os.open("/dev/full", os.O_WRONLY)
        os.dup2(nowhere, terminal.end)
        os.close(nowhere)
        screen.progress.follow(starting(2 * GIB))
        screen.progress.close()


def test_a_terminal_that_knows_no_control_sequences_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with Terminal() as terminal:
        screen = Screen(terminal)
        screen.progress.follow(starting(GIB))
        screen.stream.close()
    assert terminal.written == ""


def test_lines_of_the_log_come_at_intervals_once_loading_takes_long(server_log: ServerLog, clock: Clock) -> None:
    progress = LoadingProgress(io.StringIO())
    for quarter in range(41):  # of seconds, for twice the interval
        progress.follow(starting(quarter * GIB // 8))
        clock.now += LINE_INTERVAL / 20
    assert [line for _, line in server_log.lines] == [
        "loading weights: 2.5 GiB of 8.0 GiB (31%)",
        "loading weights: 5.0 GiB of 8.0 GiB (62%)",
    ]


def test_loading_that_takes_no_time_is_not_in_the_log(server_log: ServerLog, clock: Clock) -> None:
    progress = LoadingProgress(io.StringIO())
    progress.follow(starting(0))
    clock.now += LINE_INTERVAL * 0.9
    progress.follow(starting(8 * GIB))
    progress.follow(READY)
    assert server_log.lines == []


def test_a_group_whose_size_nobody_knows_yet_shows_nothing(server_log: ServerLog, clock: Clock) -> None:
    progress = LoadingProgress(io.StringIO())
    for _ in range(3):
        progress.follow(starting(0, 0))
        clock.now += LINE_INTERVAL
    assert server_log.lines == []


def test_a_terminal_shows_no_bar_where_the_log_is_for_machines(screen: Screen, clock: Clock) -> None:
    progress = LoadingProgress(screen.stream, has_bar=False)
    for seconds in (0.0, 2 * LINE_INTERVAL):
        clock.now += seconds
        progress.follow(starting(GIB))
    progress.close()
    screen.write("after")
    assert screen.shows("after")
