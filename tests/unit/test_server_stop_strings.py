from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from server.stop_strings import StopStrings

LETTERS = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[begin:end] for begin, end in pairwise(bounds)]


def cut(text: str, stops: list[str]) -> str:
    """The definition: end before the stop string that is complete first, of those the longest."""
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not ends:
        return text
    end, length = min(ends)
    return text[: end + length]


@given(LETTERS, STOPS, st.lists(st.integers(0, 100), max_size=8))
def test_text_in_pieces_is_cut_where_the_whole_text_would_be(text: str, stops: list[str], cuts: list[int]) -> None:
    stop = StopStrings(stops)
    passed = "".join(stop.feed(piece) for piece in pieces_of(text, cuts)) + stop.finish()
    assert passed == cut(text, stops)
    assert (stop.found is not None) == any(word in text for word in stops)


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


@given(LETTERS, STOPS)
def test_no_more_is_held_back_than_could_become_a_stop_string(text: str, stops: list[str]) -> None:
    stop, passed = StopStrings(stops), ""
    for index, character in enumerate(text):
        passed += stop.feed(character)
        if stop.found is not None:
            return
        held = text[len(passed) : index + 1]
        assert held == "" or any(word.startswith(held) for word in stops)


def test_a_false_start_is_released() -> None:
    stop = StopStrings(["</end>"])
    assert [stop.feed("a</e"), stop.feed("x")] == ["a", "</ex"]


def test_after_a_stop_string_nothing_gets_through() -> None:
    stop = StopStrings(["."])
    assert [stop.feed("a.b"), stop.feed("c"), stop.finish()] == ["a", "", ""]


def test_without_stop_strings_text_passes_at_once() -> None:
    stop = StopStrings([])
    assert (stop.feed("anything"), stop.finish()) == ("anything", "")
