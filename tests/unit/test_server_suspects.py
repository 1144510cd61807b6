import pytest

from engine.protocol.messages import Request, SamplingParams
from server.flights import Flight, Inbox
from server.suspects import MANY_LOSSES, Suspects


@pytest.fixture
def flights() -> list[Flight]:
    return [Flight(Request(name, [1], SamplingParams(max_tokens=2)), Inbox(), 0.0, 0.0) for name in "abcd"]


def test_a_first_loss_makes_nobody_suspect(flights: list[Flight]) -> None:
    suspects = Suspects()
    assert suspects.note_loss(flights) is None
    assert suspects.on_trial is None


def test_two_losses_without_a_token_make_all_of_the_last_step_suspects_the_latest_first(flights: list[Flight]) -> None:
    suspects = Suspects()
    suspects.note_loss(flights)
    suspects.note_loss(flights[:3])
    tried = []
    while (flight := suspects.on_trial) is not None:
        tried.append(flight)
        suspects.note_token(flight)
    assert tried == [flights[2], flights[1], flights[0]]


def test_a_loss_without_a_step_makes_nobody_suspect(flights: list[Flight]) -> None:
    suspects = Suspects()
    suspects.note_loss(flights)
    suspects.note_loss([])
    assert suspects.on_trial is None


def test_who_kills_alone_is_found_and_nobody_is_suspected_any_more(flights: list[Flight]) -> None:
    suspects = Suspects()
    suspects.note_loss(flights)
    suspects.note_loss(flights)
    assert suspects.note_loss([flights[3]]) is flights[3]
    assert suspects.on_trial is None
    assert suspects.has_progressed


def test_a_group_that_dies_without_a_step_says_nothing_of_who_is_on_trial(flights: list[Flight]) -> None:
    suspects = Suspects()
    suspects.note_loss(flights)
    suspects.note_loss(flights)
    assert suspects.note_loss([]) is None
    assert suspects.on_trial is flights[3]


def test_a_death_after_progress_is_not_laid_on_who_ran_alone_by_chance(flights: list[Flight]) -> None:
    suspects = Suspects()
    suspects.note_loss(flights)
    suspects.note_loss(flights)
    suspects.note_token(flights[3])
    assert suspects.note_loss([flights[2]]) is None
    assert suspects.on_trial is flights[2]
    assert suspects.note_loss([flights[2]]) is flights[2]


def test_who_never_gets_a_token_is_suspect_whatever_the_others_get(flights: list[Flight]) -> None:
    suspects = Suspects()
    for _ in range(MANY_LOSSES):
        assert suspects.on_trial is None
        suspects.note_token(flights[0])
        suspects.note_loss([flights[0], flights[3]])
    assert suspects.on_trial is flights[3]
    suspects.clear(flights[3])
    assert suspects.on_trial is None
