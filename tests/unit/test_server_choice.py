"""A choice's text and entries: one token a time or many at once, streamed or whole, they are the same."""

import json
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.protocol.messages import FinishReason, Request, SamplingParams, TokenOutput
from server.choice import Choice, Delta, TextOptions
from server.errors import APIError
from server.text.tokenizer import Tokenizer
from tests.unit.server_support import EOS, TOKENIZER, scripted_logprobs


def token_of(spelling: str) -> int:
    token = TOKENIZER.token_to_id(spelling)
    assert token is not None
    return token


EOS_ID = token_of(EOS)
A, B, SPACE = token_of("a"), token_of("b"), token_of("Ġ")
E_ACUTE = [token_of("Ã"), token_of("©")]
EURO_BEGIN = token_of("â")  # a third of €, that never goes on
B_AND_HALF_E_ACUTE = TOKENIZER.get_vocab_size()  # is added to the vocabulary
IDS = [A, B, SPACE, *E_ACUTE, EURO_BEGIN, B_AND_HALF_E_ACUTE, EOS_ID]
TOKENS = st.lists(st.sampled_from(IDS), min_size=1, max_size=24)
CHARACTERS = st.lists(
    st.sampled_from([[A], [B], [SPACE], E_ACUTE, [B_AND_HALF_E_ACUTE, E_ACUTE[1]], [EOS_ID]]), min_size=1, max_size=16
)
STOPS = st.lists(st.text("ab é", min_size=1, max_size=3), max_size=3).map(tuple)
OPTIONS = st.builds(
    TextOptions,
    stop=STOPS,
    stop_token_ids=st.sampled_from([frozenset(), frozenset({A})]),
    include_stop=st.booleans(),
    min_tokens=st.integers(0, 3) | st.just(0),
    echo=st.booleans(),
    logprobs=st.just(True),
    token_ids=st.just(True),
)
REASONS = st.sampled_from([FinishReason.STOP, FinishReason.LENGTH])
CUTS = st.lists(st.integers(0, 24), max_size=8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    file = json.loads(TOKENIZER.to_str())
    file["model"]["vocab"]["bÃ"] = B_AND_HALF_E_ACUTE
    (directory / "tokenizer.json").write_text(json.dumps(file))
    return Tokenizer(directory)


def choice_of(tokenizer: Tokenizer, options: TextOptions, prompt: list[int]) -> Choice:
    request = Request("r", prompt, SamplingParams(max_tokens=99))
    return Choice(0, request, options, tokenizer.token_bytes)


def outputs_of(tokens: list[int], reason: FinishReason, cuts: list[int], prompt: list[int]) -> list[TokenOutput]:
    """Return the tokens grouped at `cuts`; the prompt's log-probabilities come first."""
    bounds = [0, *sorted({cut for cut in cuts if 0 < cut < len(tokens)}), len(tokens)]
    scored = [TokenOutput("r", [], prompt_logprobs=[scripted_logprobs(token, 0) for token in prompt[1:]])]
    return scored + [
        TokenOutput("r", tokens[begin:end], reason if end == len(tokens) else None,
                    logprobs=[scripted_logprobs(token, 2) for token in tokens[begin:end]])
        for begin, end in pairwise(bounds)
    ]  # fmt: skip


def stream(choice: Choice, outputs: list[TokenOutput]) -> list[Delta]:
    deltas = []
    for output in outputs:
        deltas.append(choice.feed(output))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def joined(deltas: list[Delta]) -> Delta:
    last = deltas[-1]
    return Delta(
        0,
        "".join(delta.text for delta in deltas),
        last.finish_reason,
        last.stop_reason,
        [token for delta in deltas for token in delta.token_ids or ()],
        [entry for delta in deltas for entry in delta.entries],
    )


def text_of(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return b"".join(tokenizer.token_bytes[token] for token in tokens).decode("utf-8", "replace")


@given(TOKENS, TOKENS, REASONS, OPTIONS, CUTS)
def test_how_tokens_are_grouped_changes_nothing(
    tokenizer: Tokenizer,
    prompt: list[int],
    tokens: list[int],
    reason: FinishReason,
    options: TextOptions,
    cuts: list[int],
) -> None:
    grouped, single = (choice_of(tokenizer, options, prompt) for _ in range(2))
    streamed = joined(stream(grouped, outputs_of(tokens, reason, cuts, prompt)))
    whole = joined(stream(single, outputs_of(tokens, reason, list(range(24)), prompt)))
    assert streamed == whole
    assert grouped.num_tokens == single.num_tokens == len(whole.token_ids or ())
    assert grouped.mean_logprob == single.mean_logprob


@given(TOKENS, TOKENS, REASONS, st.booleans(), st.booleans(), CUTS)
def test_without_a_stop_string_each_token_of_the_text_has_one_entry(
    tokenizer: Tokenizer,
    prompt: list[int],
    tokens: list[int],
    reason: FinishReason,
    echo: bool,
    include_stop: bool,
    cuts: list[int],
) -> None:
    options = TextOptions(echo=echo, include_stop=include_stop, logprobs=True)
    answer = joined(stream(choice_of(tokenizer, options, prompt), outputs_of(tokens, reason, cuts, prompt)))
    shown = tokens[:-1] if reason is FinishReason.STOP and not include_stop else tokens
    shown = [*(prompt if echo else []), *shown]
    assert [entry.token_id for entry in answer.entries] == shown
    assert [entry.logprobs is None for entry in answer.entries] == [echo and index == 0 for index in range(len(shown))]
    if echo:
        assert answer.text == text_of(tokenizer, shown)


@given(CHARACTERS, st.data(), REASONS, STOPS, st.booleans(), CUTS)
def test_the_text_ends_at_the_stop_string_and_the_entries_with_it(
    tokenizer: Tokenizer,
    characters: list[list[int]],
    data: st.DataObject,
    reason: FinishReason,
    stop: tuple[str, ...],
    include: bool,
    cuts: list[int],
) -> None:
    tokens = [token for character in characters for token in character]
    whole = text_of(tokenizer, tokens)
    assume(whole)
    begin = data.draw(st.integers(0, len(whole) - 1))
    stop = (*stop, whole[begin : begin + data.draw(st.integers(1, 3))])
    ends = [(whole.find(text) + len(text), -len(text)) for text in stop if text in whole]
    end, length = min(ends)
    found = whole[end + length : end]
    text = whole[:end] if include else whole[: end + length]
    options = TextOptions(stop=stop, include_stop=include, logprobs=True)
    # The sequence's own end is one token later, so that it is not what ends the text.
    answer = joined(stream(choice_of(tokenizer, options, [5]), outputs_of([*tokens, EOS_ID], reason, cuts, [5])))
    assert (answer.text, answer.finish_reason, answer.stop_reason) == (text, "stop", found)
    ids = [entry.token_id for entry in answer.entries]
    assert ids == tokens[: len(ids)]
    offsets = [len(text_of(tokenizer, tokens[:index]).rstrip("\ufffd")) for index in range(len(tokens))]
    assert [entry.text_offset for entry in answer.entries] == offsets[: len(ids)]
    spoken = [index for index, token in enumerate(tokens) if tokenizer.token_bytes[token]]
    assert all((index < len(ids)) == (offsets[index] < len(text)) for index in spoken)


@given(TOKENS, REASONS, OPTIONS, CUTS)
def test_entries_never_run_ahead_of_the_text(
    tokenizer: Tokenizer, tokens: list[int], reason: FinishReason, options: TextOptions, cuts: list[int]
) -> None:
    text, seen = "", []
    for delta in stream(choice_of(tokenizer, options, [5]), outputs_of(tokens, reason, cuts, [5])):
        text += delta.text
        seen += [entry.token_id for entry in delta.entries]
        if delta.finish_reason is None:
            assert len(text_of(tokenizer, seen)) <= len(text_of(tokenizer, [5])) * options.echo + len(text)


def test_the_tokens_of_one_character_come_together(tokenizer: Tokenizer) -> None:
    first, second = E_ACUTE
    choice = choice_of(tokenizer, TextOptions(logprobs=True), [5])
    begin, end = (
        choice.feed(TokenOutput("r", [token], logprobs=[scripted_logprobs(token, 0)])) for token in (first, second)
    )
    assert (begin.text, begin.entries) == ("", [])
    assert (end.text, [entry.token_id for entry in end.entries]) == ("é", [first, second])
    assert [entry.text_offset for entry in end.entries] == [0, 0]


def test_no_stop_string_is_looked_for_in_the_first_min_tokens(tokenizer: Tokenizer) -> None:
    tokens = [A, B, A, B]
    options = TextOptions(stop=("a", "ba"), min_tokens=2)
    answer = joined(stream(choice_of(tokenizer, options, [5]), outputs_of(tokens, FinishReason.LENGTH, [], [5])))
    assert (answer.text, answer.stop_reason) == ("ab", "a")


def test_nor_in_what_the_last_of_them_leaves_incomplete(tokenizer: Tokenizer) -> None:
    outputs = outputs_of([A, EURO_BEGIN], FinishReason.LENGTH, [], [5])
    answer = joined(stream(choice_of(tokenizer, TextOptions(stop=("\ufffd",), min_tokens=2), [5]), outputs))
    assert (answer.text, answer.finish_reason) == ("a\ufffd", "length")


def test_a_token_whose_text_the_stop_string_cuts_keeps_its_entry(tokenizer: Tokenizer) -> None:
    choice = choice_of(tokenizer, TextOptions(stop=("ab",), include_stop=True, logprobs=True), [5])
    outputs = outputs_of([A, B_AND_HALF_E_ACUTE, E_ACUTE[1]], FinishReason.LENGTH, [], [5])
    answer = joined(stream(choice, outputs))
    assert (answer.text, [entry.token_id for entry in answer.entries]) == ("ab", [A, B_AND_HALF_E_ACUTE])


def test_only_a_stop_token_of_the_requests_own_is_a_stop_reason(tokenizer: Tokenizer) -> None:
    for own, reason in ((frozenset({EOS_ID}), EOS_ID), (frozenset(), None)):
        choice = choice_of(tokenizer, TextOptions(stop_token_ids=own), [5])
        delta = choice.feed(TokenOutput("r", [A, EOS_ID], FinishReason.STOP))
        assert (delta.text, delta.finish_reason, delta.stop_reason) == ("a", "stop", reason)


def test_a_choice_that_only_scores_drops_the_engines_token(tokenizer: Tokenizer) -> None:
    choice = choice_of(tokenizer, TextOptions(echo=True, scores_only=True, logprobs=True, token_ids=True), [A, B])
    scored = TokenOutput("r", [], prompt_logprobs=[scripted_logprobs(B, 0)])
    last = TokenOutput("r", [EOS_ID], FinishReason.STOP, logprobs=[scripted_logprobs(EOS_ID, 0)])
    assert choice.feed(scored) == Delta(0, "")
    delta = choice.feed(last)
    assert (delta.text, delta.finish_reason, delta.token_ids, choice.num_tokens) == ("ab", "length", [], 0)
    assert [entry.token_id for entry in delta.entries] == [A, B]


def test_an_engine_error_is_raised(tokenizer: Tokenizer) -> None:
    with pytest.raises(APIError, match="broken"):
        choice_of(tokenizer, TextOptions(), [5]).feed(TokenOutput("r", [], FinishReason.ERROR, "broken"))
