import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Reference
from transformers import PreTrainedTokenizerFast

from server.text.tokenizer import Tokenizer
from tests.tokenizers import CORPUS, FAMILIES
from tests.unit.server_support import BOS, byte_level_tokenizer

TEXTS = [
    *CORPUS,
    "",
    " ",
    "  two  spaces ",
    "a\u0301 e\u0301 \u212b",
    "x</s>y<s>[INST]<|eot_id|> <|im_end|><think>",
    "\x00\ufffd",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200) | st.text(f"{BOS} the quick\n", max_size=200)


def load(reference: Reference, folder: Path) -> Tokenizer:
    reference.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(byte_level_tokenizer(), tmp_path_factory.mktemp("model"))


@given(st.lists(TEXT, max_size=5))
def test_texts_in_a_batch_have_the_tokens_of_each(tokenizer: Tokenizer, texts: list[str]) -> None:
    each = [tokenizer.encode(text, add_special_tokens=True) for text in texts]
    assert tokenizer.encode_batch(texts, add_special_tokens=True) == each


# --- published formats -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the text files of a model of each family."""
    return FAMILIES[request.param]().write(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def ours(family: Path) -> Tokenizer:
    return Tokenizer(family)


@pytest.fixture(scope="module")
def theirs(family: Path) -> PreTrainedTokenizerFast:
    loaded = PreTrainedTokenizerFast.from_pretrained(family)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_has_the_tokens_that_transformers_gives_it(
    ours: Tokenizer, theirs: PreTrainedTokenizerFast, text: str
) -> None:
    for frame in (True, False):
        assert ours.encode(text, add_special_tokens=frame) == theirs.encode(text, add_special_tokens=frame)


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_have_the_text_and_the_spelling_that_transformers_gives_them(
    ours: Tokenizer, theirs: PreTrainedTokenizerFast, text: str
) -> None:
    ids = ours.encode(text, add_special_tokens=True)
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.token_strs(ids) == theirs.convert_ids_to_tokens(ids)


def test_an_id_without_a_token_has_no_spelling(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_strs([10_000]) == [""]
    assert tokenizer.decode([10_000]) == ""


@pytest.mark.parametrize("flag", ["add_bos_token", "add_eos_token"])
@pytest.mark.parametrize("value", [True, False])
def test_the_frame_is_that_of_tokenizer_json_whatever_the_config_says(
    family: Path, tmp_path: Path, flag: str, value: bool
) -> None:
    shutil.copytree(family, tmp_path, dirs_exist_ok=True)
    config = json.loads((family / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, flag: value}))
    ids = Tokenizer(tmp_path).encode("the house", add_special_tokens=True)
    assert ids == PreTrainedTokenizerFast.from_pretrained(tmp_path).encode("the house")
