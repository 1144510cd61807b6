from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.detokenizer import Detokenizer
from server.text.stop_strings import StopStrings
from server.text.tokenizer import Tokenizer
from tests.tokenizers import FAMILIES

FEW, MORE = "aé", "ab\né🙂"  # of few letters, many stop strings begin more than once
LETTERS = st.text(FEW, max_size=30) | st.text(MORE, max_size=30)
STOPS = st.lists(st.text(FEW, min_size=1, max_size=6) | st.text(MORE, min_size=1, max_size=5), max_size=4)
CUTS = st.lists(st.integers(0, 100), max_size=8)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[begin:end] for begin, end in pairwise(bounds)]


def cut(text: str, stops: list[str], *, include: bool = False) -> tuple[str, str | None]:
    """The definition: end before, or after, the stop string that is complete first, of those the longest."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, _, found = min(ends)
    return text[: end if include else end - len(found)], found


@given(LETTERS, STOPS, CUTS, st.booleans())
def test_text_in_pieces_is_cut_where_the_whole_text_would_be(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    stop = StopStrings(stops, include_in_output=include)
    passed = "".join(stop.feed(piece) for piece in pieces_of(text, cuts)) + stop.finish()
    assert (passed, stop.found) == cut(text, stops, include=include)


@given(LETTERS, STOPS)
def test_what_could_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    stop, passed = StopStrings(stops), ""
    for index, character in enumerate(text):
        passed += stop.feed(character)
        if stop.found is not None:
            return
        seen = text[: index + 1]
        begun = [length for word in stops for length in range(1, len(word)) if seen.endswith(word[:length])]
        assert len(passed) <= len(seen) - max(begun, default=0)


@given(LETTERS, STOPS, st.booleans())
def test_no_more_is_held_back_than_could_become_a_stop_string(text: str, stops: list[str], include: bool) -> None:
    stop, passed = StopStrings(stops, include_in_output=include), ""
    for index, character in enumerate(text):
        passed += stop.feed(character)
        if stop.found is not None:
            return
        held = text[len(passed) : index + 1]
        assert held == "" or any(word.startswith(held) for word in stops)


@given(LETTERS, STOPS, CUTS, st.booleans())
def test_nothing_that_was_passed_on_is_part_of_the_stop_string(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    stop, passed = StopStrings(stops, include_in_output=include), ""
    kept, _ = cut(text, stops)
    for piece in pieces_of(text, cuts):
        passed += stop.feed(piece)
        if stop.found is None:
            assert kept.startswith(passed)


def test_a_false_start_is_released() -> None:
    stop = StopStrings(["</end>"])
    assert [stop.feed("a</e"), stop.feed("x")] == ["a", "</ex"]


def test_a_stop_string_may_begin_within_a_false_start() -> None:
    stop = StopStrings(["aab"])
    assert ([stop.feed(letter) for letter in "xaaab"], stop.found) == (["x", "", "", "a", ""], "aab")


def test_after_a_stop_string_nothing_gets_through() -> None:
    stop = StopStrings(["."])
    assert [stop.feed("a.b"), stop.feed("c"), stop.finish()] == ["a", "", ""]


def test_a_stop_string_that_is_wanted_comes_whole_and_last() -> None:
    stop = StopStrings(["</end>"], include_in_output=True)
    assert [stop.feed("a</e"), stop.feed("nd>b"), stop.feed("c"), stop.finish()] == ["a", "</end>", "", ""]


def test_of_stop_strings_that_end_together_the_longest_is_found() -> None:
    stop = StopStrings(["b", "ab", "aab", "c"])
    assert (stop.feed("xaabc"), stop.found) == ("x", "aab")


def test_without_stop_strings_text_passes_at_once() -> None:
    stop = StopStrings([])
    assert (stop.feed("anything"), stop.finish(), stop.found) == ("anything", "", None)


# --- token by token --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["Llama 2", "Qwen 3"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(FAMILIES[request.param]().write(tmp_path_factory.mktemp("family")))


@given(LETTERS, STOPS, st.booleans())
def test_stop_strings_are_found_across_the_borders_of_tokens(
    tokenizer: Tokenizer, text: str, stops: list[str], include: bool
) -> None:
    detokenizer, stop = Detokenizer(tokenizer.token_bytes, []), StopStrings(stops, include_in_output=include)
    passed, (expected, found) = "", cut(text, stops, include=include)
    for token in tokenizer.encode(text, add_special_tokens=False):
        passed += stop.feed(detokenizer.feed([token]))
        assert expected.startswith(passed)
    passed += stop.feed(detokenizer.finish()) + stop.finish()
    assert (passed, stop.found) == (expected, found)
