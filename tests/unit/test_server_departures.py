import pytest

from server.departures import MOST_SECONDS, WINDOW_SECONDS, Departures


def leaving(rate: float, seconds: float, begin: float = 1000.0) -> Departures:
    """Return what so many a second leave behind, from `begin` on."""
    departures = Departures()
    departures.begin(begin)
    for number in range(1, int(rate * seconds) + 1):
        departures.add(begin + number / rate)
    return departures


@pytest.mark.parametrize(
    ("rate", "num_requests", "seconds"), [(4.0, 80, 20), (4.0, 1, 1), (0.5, 3, 6), (100.0, 150, 2)]
)
def test_the_time_follows_from_the_rate(rate: float, num_requests: int, seconds: int) -> None:
    assert leaving(rate, 20).seconds_until(num_requests, 1020.0) == pytest.approx(seconds, abs=1)


def test_it_is_a_second_at_least_and_has_an_end() -> None:
    assert leaving(1000, 5).seconds_until(0, 1005.0) == 1
    assert leaving(0.1, 30).seconds_until(10**6, 1030.0) == MOST_SECONDS


def test_only_the_last_seconds_count() -> None:
    departures = leaving(10, 100)
    now = 1100.0 + WINDOW_SECONDS + 1
    assert departures.seconds_until(1, now) == WINDOW_SECONDS  # none has left for as long as is looked back
    departures.begin(now)
    departures.add(now + 1)
    assert departures.seconds_until(4, now + 2) == 8


def test_the_time_before_there_was_anything_to_do_does_not_count() -> None:
    departures = Departures()
    departures.begin(5000.0)
    for number in range(10):
        departures.add(5000.1 + number / 10)
    assert departures.seconds_until(30, 5001.0) == 3


def test_those_that_left_before_a_pause_do_not_count_after_it() -> None:
    departures = leaving(50, 5)
    departures.begin(1006.0)
    departures.add(1007.0)
    assert departures.seconds_until(10, 1008.0) == 20


def test_while_none_has_left_the_time_grows() -> None:
    departures = Departures()
    departures.begin(50.0)
    times = [departures.seconds_until(10, 50.0 + waited) for waited in (0.0, 0.5, 1.0, 3.0)]
    assert times == [1, 5, 10, 30]
