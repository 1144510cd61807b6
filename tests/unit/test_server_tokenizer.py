from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Reference

from server.tokenizer import Tokenizer
from tests.unit.server_support import BOS, byte_fallback_tokenizer, byte_level_tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200) | st.text(f"{BOS} the quick\n", max_size=200)


def load(reference: Reference, folder: Path) -> Tokenizer:
    reference.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(byte_level_tokenizer(), tmp_path_factory.mktemp("model"))


@given(TEXT)
def test_no_text_has_fewer_tokens_than_the_least(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


def test_the_least_grows_with_the_text_and_the_longest_token(tokenizer: Tokenizer) -> None:
    longest = max(len(token) for token in byte_level_tokenizer().get_vocab())
    assert tokenizer.least_tokens("x" * 10 * longest) == 10
    assert tokenizer.least_tokens("x" * (10 * longest + 1)) == 11


@given(st.lists(TEXT, max_size=5))
def test_texts_in_a_batch_have_the_tokens_of_each(tokenizer: Tokenizer, texts: list[str]) -> None:
    each = [tokenizer.encode(text, add_special_tokens=True) for text in texts]
    assert tokenizer.encode_batch(texts, add_special_tokens=True) == each


def shrinking_tokenizers() -> dict[str, Reference]:
    """All of these make few tokens of some long text."""
    normalizing, stripping, removing, whitespace = (byte_level_tokenizer() for _ in range(4))
    normalizing.normalizer = normalizers.Strip()
    stripping.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    removing.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    whitespace.pre_tokenizer = pre_tokenizers.Whitespace()
    return {"normalizer": normalizing, "added": stripping, "split": removing, "whitespace": whitespace}


@pytest.mark.parametrize("kind", ["normalizer", "added", "split", "whitespace"])
def test_nothing_is_known_where_text_can_vanish(kind: str, tmp_path: Path) -> None:
    tokenizer = load(shrinking_tokenizers()[kind], tmp_path)
    text = " " * 10_000 + "<mask>"
    assert len(tokenizer.encode(text, add_special_tokens=False)) < 10
    assert tokenizer.least_tokens(text) == 0


def test_nothing_is_known_of_sentencepiece(tmp_path: Path) -> None:
    assert load(byte_fallback_tokenizer(), tmp_path).least_tokens("x" * 10_000) == 0
