from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Reference
from tokenizers import decoders

from server.text.detokenizer import Detokenizer
from server.text.token_bytes import TokenBytes
from server.text.tokenizer import Tokenizer
from tests.tokenizers import FAMILIES
from tests.unit.server_support import BOS, EOS, byte_fallback_tokenizer, byte_level_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
BYTE_FALLBACK = byte_fallback_tokenizer()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
WORDS = st.text("the ing é!\n漢🙂", max_size=40)


def load(reference: Reference, folder: Path) -> Tokenizer:
    reference.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(BYTE_LEVEL, tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(BYTE_FALLBACK, tmp_path_factory.mktemp("byte_fallback"))


def in_steps(token_bytes: TokenBytes, prompt: list[int], token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(token_bytes, prompt)
    return [*(detokenizer.feed([token_id]) for token_id in token_ids), detokenizer.finish()]


@given(TEXT | WORDS)
def test_byte_level_text_in_steps_equals_the_library_on_all_tokens(byte_level: Tokenizer, text: str) -> None:
    ids = BYTE_LEVEL.encode(text).ids
    assert "".join(in_steps(byte_level.token_bytes, [], ids)) == BYTE_LEVEL.decode(ids) == text


@given(TEXT | WORDS)
def test_byte_fallback_text_in_steps_equals_the_library_on_all_tokens(byte_fallback: Tokenizer, text: str) -> None:
    ids = BYTE_FALLBACK.encode(text).ids
    assert "".join(in_steps(byte_fallback.token_bytes, [], ids)) == BYTE_FALLBACK.decode(ids) == text


@given(st.lists(st.integers(0, 399), max_size=30))
def test_any_byte_level_tokens_in_steps_equal_the_library_on_all_of_them(byte_level: Tokenizer, ids: list[int]) -> None:
    assert "".join(in_steps(byte_level.token_bytes, [], ids)) == BYTE_LEVEL.decode(ids)


@given(WORDS, WORDS)
def test_a_completion_continues_its_prompts_text(byte_fallback: Tokenizer, prompt: str, more: str) -> None:
    ids = BYTE_FALLBACK.encode(prompt + more).ids
    for border in range(1, len(ids) + 1):
        before, after = (
            BYTE_FALLBACK.decode(ids[:border]),
            "".join(in_steps(byte_fallback.token_bytes, ids[:border], ids[border:])),
        )
        if "\ufffd" not in before:  # a character cut in two belongs to the completion
            assert before + after == prompt + more


@given(TEXT)
def test_no_step_shows_a_part_of_a_character(byte_level: Tokenizer, text: str) -> None:
    for piece in in_steps(byte_level.token_bytes, [], BYTE_LEVEL.encode(text).ids):
        assert "\ufffd" not in piece or "\ufffd" in text


def test_a_prompt_that_ends_inside_a_character_is_completed(byte_level: Tokenizer) -> None:
    ids = BYTE_LEVEL.encode("🙂", add_special_tokens=False).ids
    assert len(ids) == 4
    assert in_steps(byte_level.token_bytes, ids[:2], ids[2:]) == ["", "🙂", ""]


def test_bytes_that_never_become_a_character_are_shown_at_the_end(byte_level: Tokenizer) -> None:
    ids = BYTE_LEVEL.encode("é", add_special_tokens=False).ids
    assert in_steps(byte_level.token_bytes, [], ids[:1]) == ["", "\ufffd"]


def test_special_tokens_and_unknown_ids_have_no_text(byte_level: Tokenizer) -> None:
    ids = [byte_level.id_of(BOS), byte_level.id_of(EOS), 10_000]
    assert [byte_level.token_bytes[token_id] for token_id in ids if token_id is not None] == [b"", b"", b""]


def test_added_tokens_that_are_not_special_have_text(tmp_path: Path) -> None:
    reference = byte_level_tokenizer()
    reference.add_tokens(["<tool> x"])
    ids = reference.encode("a<tool> x b", add_special_tokens=False).ids
    tokens = load(reference, tmp_path).token_bytes
    assert "".join(in_steps(tokens, [], ids)) == reference.decode(ids) == "a<tool> x b"


def test_metaspace_is_read(tmp_path: Path) -> None:
    reference = byte_fallback_tokenizer()
    reference.decoder = decoders.Metaspace()
    ids = reference.encode("the thing", add_special_tokens=False).ids
    assert "".join(in_steps(load(reference, tmp_path).token_bytes, [], ids)) == reference.decode(ids) == "the thing"


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.CTC(), decoders.Strip("_", 1, 0), None])
def test_a_decoder_of_another_kind_is_refused_by_name(tmp_path: Path, decoder: decoders.Decoder | None) -> None:
    reference = byte_level_tokenizer()
    reference.decoder = decoder
    with pytest.raises(ValueError, match="decoder"):
        load(reference, tmp_path)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_prompts_are_neither_cut_nor_filled_up(tmp_path: Path) -> None:
    reference = byte_level_tokenizer()
    expected = reference.encode("hello world " * 5).ids
    reference.enable_truncation(4)
    reference.enable_padding(length=100)
    assert load(reference, tmp_path).encode("hello world " * 5, add_special_tokens=True) == expected


# --- published formats -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A family's tokenizer, theirs and ours."""

    theirs: Reference
    ours: Tokenizer
    byte_tokens: dict[int, int]  # a byte's token, where the vocabulary has tokens for unknown characters

    def token_bytes(self, *, with_special: bool) -> TokenBytes:
        return self.ours.token_bytes_with_special if with_special else self.ours.token_bytes


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    theirs = FAMILIES[request.param]().tokenizer
    tokens = {byte: theirs.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    found = {byte: token for byte, token in tokens.items() if token is not None}
    return Loaded(theirs, load(theirs, tmp_path_factory.mktemp("family")), found)


ANY_IDS = st.lists(st.integers(0, 600), max_size=40)
CUTS = st.lists(st.integers(0, 40), max_size=6)


def in_chunks(token_bytes: TokenBytes, prompt: list[int], ids: list[int], cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    detokenizer = Detokenizer(token_bytes, prompt)
    return [*(detokenizer.feed(ids[begin:end]) for begin, end in pairwise(bounds)), detokenizer.finish()]


def readable(family: Loaded, data: st.DataObject) -> list[int]:
    """Draw ids whose runs of byte tokens are whole characters: of others the library makes a U+FFFD a byte."""
    byte_tokens = family.byte_tokens
    parts = st.sampled_from([[token] for token in range(600) if token not in byte_tokens.values()])
    if byte_tokens:
        characters = st.characters(exclude_categories=["Cs"])
        parts |= characters.map(lambda character: [byte_tokens[byte] for byte in character.encode()])
    return [token for part in data.draw(st.lists(parts, max_size=20)) for token in part]


@given(st.data(), st.booleans(), CUTS)
def test_any_tokens_in_any_chunks_have_the_text_that_the_library_gives_them(
    family: Loaded, data: st.DataObject, with_special: bool, cuts: list[int]
) -> None:
    ids = readable(family, data)
    pieces = in_chunks(family.token_bytes(with_special=with_special), [], ids, cuts)
    assert "".join(pieces) == family.theirs.decode(ids, skip_special_tokens=not with_special)


@given(ANY_IDS, st.booleans(), CUTS)
def test_bytes_that_are_no_text_become_one_mark_for_each_maximal_subpart(
    family: Loaded, ids: list[int], with_special: bool, cuts: list[int]
) -> None:
    token_bytes = family.token_bytes(with_special=with_special)
    whole = b"".join(token_bytes[token] for token in ids).decode("utf-8", "replace")
    text = "".join(in_chunks(token_bytes, [], ids, cuts))
    assert text == (whole.removeprefix(" ") if token_bytes.leading_spaces else whole)


@given(TEXT | WORDS, st.booleans(), CUTS)
def test_a_text_comes_back_whole_and_in_whole_characters(
    family: Loaded, text: str, with_special: bool, cuts: list[int]
) -> None:
    ids = family.theirs.encode(text, add_special_tokens=False).ids
    whole = family.theirs.decode(ids, skip_special_tokens=not with_special)
    pieces = in_chunks(family.token_bytes(with_special=with_special), [], ids, cuts)
    assert "".join(pieces) == whole
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(TEXT | WORDS)
def test_only_bytes_of_a_character_that_is_not_complete_are_held_back(family: Loaded, text: str) -> None:
    token_bytes = family.token_bytes(with_special=True)
    detokenizer = Detokenizer(token_bytes, [])
    shown, raw = "", b""
    for token in family.theirs.encode(text, add_special_tokens=False).ids:
        shown += detokenizer.feed([token])
        raw += token_bytes[token]
        complete = raw.decode("utf-8", "ignore")  # leaves out an end that is cut
        assert shown == (complete.removeprefix(" ") if token_bytes.leading_spaces else complete)


@given(st.data(), st.integers(0, 20), st.booleans())
def test_a_completion_of_any_tokens_continues_its_prompt(
    family: Loaded, data: st.DataObject, border: int, with_special: bool
) -> None:
    ids = readable(family, data)
    decode = partial(family.theirs.decode, skip_special_tokens=not with_special)
    prompt, completion = ids[:border], ids[border:]
    assume("\ufffd" not in decode(prompt))  # a character cut in two belongs to the completion
    pieces = in_chunks(family.token_bytes(with_special=with_special), prompt, completion, [])
    assert decode(prompt) + "".join(pieces) == decode(ids)


def test_control_tokens_are_silent_or_written_out(family: Loaded) -> None:
    for text, token in family.theirs.get_vocab(with_added_tokens=True).items():
        added = family.theirs.get_added_tokens_decoder().get(token)
        if added is not None:
            assert family.ours.token_bytes[token] == (b"" if added.special else text.encode())
            assert family.ours.token_bytes_with_special[token] == text.encode()
