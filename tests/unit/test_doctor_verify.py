"""When two groups' answers count as the same."""

import math

import pytest

from engine.protocol.messages import TokenLogprobs
from server.doctor.verify import NEW_TOKENS, PROMPT_LENGTHS, Transcript, compare, prompts


def transcript(*tokens: tuple[int, float, int, float]) -> Transcript:
    """Return what a group said: at each position its best and second-best token with their log-probabilities."""
    logprobs = [TokenLogprobs(best, p, 1, [best, second], [p, q]) for best, p, second, q in tokens]
    return Transcript([item.token_id for item in logprobs], logprobs)


def test_equal_transcripts_are_the_same() -> None:
    said = [transcript((5, -0.1, 6, -3.0), (7, -0.2, 8, -2.0))]
    found = compare(said, said, 1e-3)
    assert (found.num_tokens, found.near_ties, found.differences, found.largest_gap) == (2, 0, [], 0.0)


def test_a_difference_at_a_near_tie_is_counted_and_ends_the_prompts_comparison() -> None:
    one = [transcript((5, -0.70, 6, -0.71), (1, -0.1, 2, -9.0))]
    other = [transcript((6, -0.70, 5, -0.71), (3, -5.0, 4, -9.0))]
    found = compare(one, other, 0.05)
    assert (found.num_tokens, found.near_ties, found.differences) == (1, 1, [])
    assert found.largest_gap == pytest.approx(0.01)


def test_any_other_difference_is_named() -> None:
    one, other = [transcript((5, -0.1, 6, -2.1))], [transcript((6, -0.1, 5, -2.1))]
    found = compare(one, other, 0.05)
    assert found.near_ties == 0
    assert found.differences == ["prompt 0, token 0: 5 unsplit, 6 split, 2 apart"]
    assert found.largest_gap == pytest.approx(2.0)


def test_log_probabilities_are_compared_by_token() -> None:
    one, other = [transcript((5, -0.5, 6, -0.9))], [transcript((5, -0.4, 7, -0.9))]
    assert compare(one, other, 0.05).largest_gap == pytest.approx(0.1)


def test_a_token_far_from_the_best_is_no_near_tie_though_the_two_best_are_one() -> None:
    one, other = [transcript((5, -0.70, 6, -0.71))], [transcript((7, -0.70, 5, -0.71))]
    found = compare(one, other, 0.05)
    assert found.near_ties == 0
    assert found.differences == ["prompt 0, token 0: 5 unsplit, 7 split, which is not among the 5 likeliest"]


def test_a_chosen_token_that_the_other_does_not_report_is_as_far_as_the_others_last() -> None:
    one, other = [transcript((5, -0.1, 6, -3.0))], [transcript((7, -0.2, 8, -2.5))]
    assert compare(one, other, 0.05).largest_gap == pytest.approx(2.8)  # of 7; of 5 it is 2.4


@pytest.mark.parametrize("number", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_log_probabilities_that_are_no_numbers_are_never_the_same(number: float, place: int) -> None:
    fine = [transcript((5, -0.1, 6, -3.0))]
    broken = [transcript((5, number, 6, -3.0) if place == 0 else (5, -0.1, 6, number))]
    for one, other in ((fine, broken), (broken, fine), (broken, broken)):
        assert compare(one, other, 0.05).largest_gap == math.inf


def test_tokens_that_part_at_numbers_that_are_none_are_no_near_tie() -> None:
    one, other = [transcript((5, math.nan, 6, math.nan))], [transcript((6, math.nan, 5, math.nan))]
    assert compare(one, other, 0.05).near_ties == 0


def test_prompts_are_the_same_each_time_within_the_vocabulary_and_leave_room() -> None:
    drawn = prompts(50, 1024)
    assert drawn == prompts(50, 1024)
    assert [len(prompt) for prompt in drawn] == list(PROMPT_LENGTHS)
    assert all(0 <= token_id < 50 for prompt in drawn for token_id in prompt)
    assert max(map(len, prompts(50, NEW_TOKENS + 16))) == 16
    assert prompts(50, 8) == [prompts(50, 8)[0][:1]]
