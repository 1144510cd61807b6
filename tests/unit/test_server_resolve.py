import json
from pathlib import Path

import pytest

from engine.protocol.config import EMBEDDED_MODEL
from server.config import ServerConfig
from server.model_source.config import ModelSourceConfig
from server.model_source.resolve import is_on_hub, resolve


def step(parent: Path, number: int) -> Path:
    directory = parent / f"model-step-{number}"
    directory.mkdir(parents=True)
    (directory / "metadata.json").write_text(json.dumps({"config": {}}))
    return directory


def test_a_directory_is_what_it_is() -> None:
    checked: list[Path] = []
    assert resolve(str(EMBEDDED_MODEL), ModelSourceConfig(), checked.append) == EMBEDDED_MODEL
    assert checked == [EMBEDDED_MODEL]


def test_the_parent_of_steps_means_the_latest_and_gives_its_own_name(tmp_path: Path) -> None:
    step(tmp_path / "run", 9)
    latest = step(tmp_path / "run", 10)
    assert resolve(str(tmp_path / "run"), ModelSourceConfig(), bool) == latest
    assert ServerConfig().model_name(str(tmp_path / "run")) == "run"


def test_a_directory_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_on_hub("org/name")
    assert ServerConfig().model_name("org/name") == "org/name"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_on_hub("org/name")
    assert resolve("org/name", ModelSourceConfig(offline=True), bool) == Path("org/name")
    assert ServerConfig().model_name("org/name") == "name"


@pytest.mark.parametrize("model", ["/no/such/directory", "name", "org/a/b", "./org/name"])
def test_what_is_neither_a_directory_nor_a_name_on_the_hub_is_an_error(model: str) -> None:
    with pytest.raises(ValueError, match=f"model: {model} is not a directory, nor a name on the hub such as org/name"):
        resolve(model, ModelSourceConfig(), bool)


def test_a_revision_of_a_directory_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"--revision is for models of the hub, and .* is a directory"):
        resolve(str(EMBEDDED_MODEL), ModelSourceConfig(revision="v1"), bool)


def test_what_the_check_says_is_the_error() -> None:
    def refuse(directory: Path) -> None:
        raise ValueError(f"not {directory.name}")

    with pytest.raises(ValueError, match=r"^not model$"):
        resolve(str(EMBEDDED_MODEL), ModelSourceConfig(), refuse)


def test_what_cannot_be_looked_into_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    for model in (f"org/{'n' * 300}", f"./{'n' * 300}"):
        with pytest.raises(ValueError, match=r"^model: .*nnn cannot be looked into: File name too long$"):
            resolve(model, ModelSourceConfig(offline=True), bool)
