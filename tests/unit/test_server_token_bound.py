from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Reference

from server.text.tokenizer import Tokenizer
from tests.tokenizers import FAMILIES, llama_2, qwen_3
from tests.unit.server_support import BOS, byte_level_tokenizer

# Marks, Hangul and the signs of kelvin and grave: what NFC makes shorter.
SHRINKING = st.text("a\u0308\u0301\u0345\u03c9\u0342\u1112\u1161\u11ab\u212a\u1fef <>|", max_size=200)
WORDS = st.text(f"{BOS} the▁quick\n", max_size=200)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200) | WORDS | SHRINKING


def load(reference: Reference, folder: Path) -> Tokenizer:
    reference.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(FAMILIES[request.param]().tokenizer, tmp_path_factory.mktemp("family"))


@given(TEXT)
def test_no_text_has_fewer_tokens_than_the_least(family: Tokenizer, text: str) -> None:
    assert family.least_tokens(text) <= len(family.encode(text, add_special_tokens=False))


def test_something_is_known_of_every_family(family: Tokenizer) -> None:
    assert family.least_tokens("to be or not to be " * 1000) > 100


def test_the_least_grows_with_the_text_and_the_longest_token(tmp_path: Path) -> None:
    tokenizer = load(byte_level_tokenizer(), tmp_path)
    longest = max(len(token) for token in byte_level_tokenizer().get_vocab())
    assert tokenizer.least_tokens("x" * 10 * longest) == 10
    assert tokenizer.least_tokens("x" * (10 * longest + 1)) == 11


def test_after_nfc_only_ascii_counts(tmp_path: Path) -> None:
    tokenizer = load(qwen_3().tokenizer, tmp_path)
    assert tokenizer.least_tokens("e\u0301" * 1000) == tokenizer.least_tokens("e" * 1000)
    assert tokenizer.least_tokens("\u1112\u1161\u11ab" * 1000) == 0


def changed_tokenizers() -> dict[str, Reference]:
    """Each of these makes few tokens of some long text."""
    normalizing, stripping, removing, whitespace, words = (byte_level_tokenizer() for _ in range(5))
    normalizing.normalizer = normalizers.Strip()
    stripping.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    removing.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    whitespace.pre_tokenizer = pre_tokenizers.Whitespace()
    words.model = models.WordLevel({**words.get_vocab(), "?": 1000}, unk_token="?")
    replacing, merging, unknowing = (llama_2().tokenizer for _ in range(3))
    replacing.normalizer = normalizers.Replace("  ", "▁")
    merging.normalizer = normalizers.NFC()
    unknowing.model = models.BPE({"<unk>": 0, "x": 1}, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    return {
        "a normalizer that strips": normalizing,
        "an added token that strips": stripping,
        "a split that removes": removing,
        "a pre-tokenizer that removes": whitespace,
        "unknown words": words,
        "a replacement that shortens": replacing,
        "pieces after NFC": merging,
        "unknown characters": unknowing,
    }


@pytest.mark.parametrize("kind", changed_tokenizers())
def test_nothing_is_known_where_text_can_vanish(kind: str, tmp_path: Path) -> None:
    tokenizer = load(changed_tokenizers()[kind], tmp_path)
    assert tokenizer.least_tokens(" " * 10_000 + "x" * 10_000) == 0
