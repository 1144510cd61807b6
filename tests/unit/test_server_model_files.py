import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest

from engine.protocol.model_config import ModelConfig
from server.config import ServerConfig
from server.model_files import ModelFiles, SamplingDefaults
from server.service import TextModel
from tests.unit.server_support import BOS, EOS, VOCAB_SIZE, byte_level_tokenizer, write_model


def load(model: Path, **options: Any) -> TextModel:
    files = ModelFiles.read(str(model))
    return TextModel.load(files, ServerConfig(**options), ModelConfig.from_directory(model))


def rewrite(path: Path, **changed: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def test_sampling_defaults_are_the_generation_configs(tmp_path: Path) -> None:
    write_model(tmp_path, temperature=0.6, top_p=0.9, top_k=-1, min_p=0.1)
    assert ModelFiles.read(str(tmp_path)).sampling_defaults() == SamplingDefaults(0.6, 0.9, 0, 0.1)


def test_without_a_generation_config_sampling_is_neutral(tmp_path: Path) -> None:
    (write_model(tmp_path) / "generation_config.json").unlink()
    assert load(tmp_path).sampling_defaults == SamplingDefaults()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": math.inf},
        {"top_p": 2},
        {"top_p": math.nan},
        {"top_k": "x"},
        {"top_k": 1.5},
        {"top_k": math.nan},
        {"top_k": math.inf},
        {"top_k": 1e300},
        {"top_k": 2**63},
        {"top_k": True},
        {"min_p": True},
    ],
)
def test_a_sampling_default_that_cannot_be_is_named_with_its_file(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"generation_config\.json: {next(iter(wrong))}"):
        load(write_model(tmp_path, **wrong))


def test_a_whole_number_may_be_written_with_a_point(tmp_path: Path) -> None:
    assert load(write_model(tmp_path, top_k=50.0)).sampling_defaults.top_k == 50


def test_defaults_without_effect_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(write_model(tmp_path, typical_p=0.9))
    assert "typical_p=0.9" in caplog.text


def test_the_end_of_text_comes_from_generation_config_then_config_then_tokenizer(tmp_path: Path) -> None:
    write_model(tmp_path, eos_token_id=[7, 8, 7])
    assert load(tmp_path).stop_token_ids == (7, 8)
    rewrite(tmp_path / "generation_config.json", eos_token_id=9)
    assert load(tmp_path).stop_token_ids == (9,)
    rewrite(tmp_path / "generation_config.json", eos_token_id=None)
    rewrite(tmp_path / "config.json", eos_token_id=10)
    assert load(tmp_path).stop_token_ids == (10,)
    rewrite(tmp_path / "config.json", eos_token_id=None)
    assert load(tmp_path).stop_token_ids == (byte_level_tokenizer().token_to_id(EOS),)


@pytest.mark.parametrize("wrong", [["x"], [[1]], True, -1, [7, -1], 7.0, "7", {"id": 7}])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_end_of_text_that_is_no_token_id_is_named_with_its_file(tmp_path: Path, name: str, wrong: object) -> None:
    rewrite(write_model(tmp_path) / name, eos_token_id=wrong)
    with pytest.raises(ValueError, match=rf"/{re.escape(name)}: eos_token_id must be a token id"):
        load(tmp_path)


def test_ends_of_text_outside_the_vocabulary_are_warned_of_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_model(tmp_path, eos_token_id=[7, VOCAB_SIZE])
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path).stop_token_ids == (7,)
    assert f"[{VOCAB_SIZE}]" in caplog.text
    rewrite(tmp_path / "generation_config.json", eos_token_id=VOCAB_SIZE)
    rewrite(tmp_path / "config.json", eos_token_id=VOCAB_SIZE - 1)
    assert load(tmp_path).stop_token_ids == (VOCAB_SIZE - 1,)


def test_special_tokens_are_strings_or_objects(tmp_path: Path) -> None:
    assert ModelFiles.read(str(write_model(tmp_path))).special_tokens() == {"bos_token": BOS, "eos_token": EOS}


def test_the_option_wins_over_the_template_file_and_that_over_the_config(tmp_path: Path) -> None:
    files = ModelFiles.read(str(write_model(tmp_path)))
    rewrite(tmp_path / "tokenizer_config.json", chat_template=[{"name": "default", "template": "from a list"}])
    assert ModelFiles.read(str(tmp_path)).chat_template(None) == "from a list"
    (tmp_path / "chat_template.jinja").write_text("from a file")
    assert files.chat_template(None) == "from a file"
    (tmp_path / "mine").write_text("from the option")
    assert files.chat_template(str(tmp_path / "mine")) == "from the option"
    with pytest.raises(ValueError, match="--chat-template"):
        files.chat_template(str(tmp_path / "none"))


def test_a_file_that_is_no_json_object_is_named(tmp_path: Path) -> None:
    write_model(tmp_path)
    for content in ("{", "[]", '{"a": ' * 100_000):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
            load(tmp_path)


def test_the_seed_option_makes_the_seeds_that_are_drawn_repeatable(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    first, again, free = load(model, seed=5), load(model, seed=5), load(model)
    assert first.seeds.getrandbits(64) == again.seeds.getrandbits(64) != free.seeds.getrandbits(64)


def test_seeds_of_different_sign_draw_different_seeds(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    assert load(model, seed=5).seeds.getrandbits(64) != load(model, seed=-5).seeds.getrandbits(64)


def test_what_was_read_is_not_read_again(tmp_path: Path) -> None:
    files = ModelFiles.read(str(write_model(tmp_path, top_k=7)))
    config = ModelConfig.from_directory(tmp_path)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    assert TextModel.load(files, ServerConfig(), config).sampling_defaults.top_k == 7
