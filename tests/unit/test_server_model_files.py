import json
import logging
from pathlib import Path
from typing import Any

import pytest

from engine.protocol.config import EngineConfig
from engine.protocol.model_config import ModelConfig
from server.config import ServerConfig
from server.model_files import ModelFiles, SamplingDefaults
from server.service import TextModel
from tests.unit.server_support import BOS, EOS, byte_level_tokenizer, write_model


def load(model: Path, **options: Any) -> TextModel:
    return TextModel.load(EngineConfig(model=str(model)), ServerConfig(**options), ModelConfig.from_directory(model))


def rewrite(path: Path, **changed: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def test_sampling_defaults_are_the_generation_configs(tmp_path: Path) -> None:
    write_model(tmp_path, temperature=0.6, top_p=0.9, top_k=-1, min_p=0.1)
    assert ModelFiles.read(str(tmp_path)).sampling_defaults() == SamplingDefaults(0.6, 0.9, 0, 0.1)


def test_without_a_generation_config_sampling_is_neutral(tmp_path: Path) -> None:
    (write_model(tmp_path) / "generation_config.json").unlink()
    assert load(tmp_path).sampling_defaults == SamplingDefaults()


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 2}, {"top_k": "x"}, {"min_p": True}])
def test_a_sampling_default_that_cannot_be_is_named_with_its_file(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"generation_config\.json: {next(iter(wrong))}"):
        load(write_model(tmp_path, **wrong))


def test_defaults_without_effect_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(write_model(tmp_path, repetition_penalty=1.1))
    assert "repetition_penalty=1.1" in caplog.text


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
    for content in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
            load(tmp_path)


def test_the_seed_option_makes_the_seeds_that_are_drawn_repeatable(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    first, again, free = load(model, seed=5), load(model, seed=5), load(model)
    assert first.seeds.getrandbits(64) == again.seeds.getrandbits(64) != free.seeds.getrandbits(64)
