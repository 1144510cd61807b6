"""Which directory holds a model."""

import json
from pathlib import Path

import pytest

from engine.protocol.model_directory import (
    find_model_directory,
    is_directory,
    is_distributed,
    read_model_config,
    step_directory,
    steps_in,
)


def make_step(parent: Path, step: int) -> Path:
    directory = step_directory(parent, step)
    directory.mkdir(parents=True)
    (directory / "metadata.json").write_text(json.dumps({"config": {"step": step}}))
    return directory


def test_a_model_directory_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert find_model_directory(tmp_path) == tmp_path
    assert find_model_directory(make_step(tmp_path / "steps", 3)) == tmp_path / "steps" / "model-step-3"


def test_of_several_steps_the_latest_is_taken_by_number(tmp_path: Path) -> None:
    for step in (900, 1000, 99):
        make_step(tmp_path, step)
    assert steps_in(tmp_path) == [99, 900, 1000]
    assert find_model_directory(tmp_path).name == "model-step-1000"


def test_a_step_can_be_asked_for(tmp_path: Path) -> None:
    make_step(tmp_path, 900)
    make_step(tmp_path, 1000)
    assert find_model_directory(tmp_path, step=900).name == "model-step-900"


def test_a_step_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    make_step(tmp_path, 900)
    with pytest.raises(ValueError, match=r"has no checkpoint of step 7; it has 900$"):
        find_model_directory(tmp_path, step=7)


def test_what_is_not_whole_is_no_step(tmp_path: Path) -> None:
    """Such as what a saver is writing, a directory that lacks its metadata, or one of another name."""
    make_step(tmp_path, 900)
    step_directory(tmp_path, 1000).mkdir()
    (tmp_path / ".model-step-1100.tmp-1-ab").mkdir()
    (tmp_path / "model-step-x").mkdir()
    assert steps_in(tmp_path) == [900]


def test_a_directory_with_a_config_json_is_no_distributed_checkpoint_whatever_is_beside(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "metadata.json").write_text('{"made by": "another program"}')
    assert not is_distributed(tmp_path)
    assert read_model_config(tmp_path) == ({"model_type": "llama"}, str(tmp_path / "config.json"))


def test_a_distributed_checkpoints_configuration_is_in_its_metadata(tmp_path: Path) -> None:
    directory = make_step(tmp_path, 5)
    assert read_model_config(directory) == ({"step": 5}, f"{directory / 'metadata.json'}: config")


@pytest.mark.parametrize("content", ["[]", "{}", '{"config": 3}', "{"])
def test_metadata_without_a_configuration_is_named(tmp_path: Path, content: str) -> None:
    directory = make_step(tmp_path, 5)
    (directory / "metadata.json").write_text(content)
    with pytest.raises(ValueError, match=r"^.*metadata\.json: "):
        read_model_config(directory)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has neither config\.json nor metadata\.json, nor any model-step-N"):
        find_model_directory(tmp_path)
    with pytest.raises(ValueError, match="is not a directory"):
        find_model_directory(tmp_path / "nowhere")


def test_what_cannot_be_looked_into_is_named(tmp_path: Path) -> None:
    too_long = tmp_path / ("n" * 300)
    with pytest.raises(ValueError, match=r"^model: .*nnn cannot be looked into: File name too long$"):
        find_model_directory(too_long)
    with pytest.raises(ValueError, match=r"^model: .*nnn cannot be looked into: File name too long$"):
        is_directory(too_long)
    with pytest.raises(ValueError, match=r"^model: .*nnn cannot be looked into: File name too long$"):
        read_model_config(too_long)
