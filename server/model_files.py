"""The small files beside the weights that concern text: tokenizer, chat template, generation defaults."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.protocol.model_directory import is_distributed, read_model_config, read_object
from server.limits import INT64, MAX_REPETITION_PENALTY, MAX_TEMPERATURE, MIN_REPETITION_PENALTY
from server.text.chat_template import SPECIAL_TOKENS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request gets that does not say, from `generation_config.json`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class ModelFiles:
    """The model's configuration, and what `generation_config.json` and `tokenizer_config.json` hold, if they are there.

    Raises:
        ValueError: naming the file that cannot be used.
    """

    directory: Path
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    tokenizer: Mapping[str, Any]

    @classmethod
    def read(cls, model: str) -> "ModelFiles":
        """Read the files of directory `model`."""
        directory = Path(model)
        if not (directory / "tokenizer.json").is_file():
            raise ValueError(f"model: {directory} has no tokenizer.json")
        return cls(
            directory,
            read_model_config(directory)[0] if is_distributed(directory) else _read_json(directory / "config.json"),
            _read_json(directory / "generation_config.json"),
            _read_json(directory / "tokenizer_config.json"),
        )

    def special_tokens(self) -> dict[str, str]:
        """Return the texts of `bos_token` and its like, which may be written as strings or as objects."""
        found = {}
        for name in SPECIAL_TOKENS:
            token = self.tokenizer.get(name)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                found[name] = text
        return found

    def end_of_text_ids(self, vocab_size: int) -> tuple[int, ...]:
        """Return the ids that end a sequence; none where only the tokenizer may know one.

        Raises:
            ValueError: naming the file, when its `eos_token_id` is neither an id nor a list of ids.
        """
        for name, content in (("generation_config.json", self.generation), ("config.json", self.config)):
            ids = _token_ids(content.get("eos_token_id"), f"{self.directory / name}: eos_token_id")
            unknown = [token_id for token_id in ids if token_id >= vocab_size]
            if unknown:  # some published models have such ids, which do no harm: they are never sampled
                logger.warning("%s: eos_token_id: without effect, not in the vocabulary: %s", name, unknown)
            if len(unknown) < len(ids):
                return tuple(dict.fromkeys(token_id for token_id in ids if token_id < vocab_size))
        return ()

    def ignored_defaults(self) -> list[str]:
        """Return the generation config's sampling values that have no effect here, as `name=value`."""
        neutral = {"typical_p": 1.0, "min_new_tokens": 0, "bad_words_ids": []}
        values = {name: self.generation.get(name) for name in neutral}
        return [f"{name}={value}" for name, value in values.items() if value is not None and value != neutral[name]]

    def sampling_defaults(self) -> SamplingDefaults:
        """Return the generation config's sampling values."""
        return SamplingDefaults(
            temperature=self._number("temperature", 1.0, 0.0, MAX_TEMPERATURE),
            top_p=self._number("top_p", 1.0, 0.0, 1.0),
            top_k=max(0, self._whole_number("top_k", 0, -1, INT64 - 1)),
            min_p=self._number("min_p", 0.0, 0.0, 1.0),
            repetition_penalty=self._number("repetition_penalty", 1.0, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
        )

    def _number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.generation.get(name)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise self._wrong(name, value)
        return float(value)

    def _whole_number(self, name: str, default: int, low: int, high: int) -> int:
        value = self.generation.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(name, value)
        return value

    def _wrong(self, name: str, value: object) -> ValueError:
        return ValueError(f"{self.directory / 'generation_config.json'}: {name} cannot be {value!r}")

    def chat_template(self, override: str | None) -> str | None:
        """Return the template's source: from file `override`, the model's `chat_template.jinja`, or its config."""
        if override is not None:
            return _read_text(Path(override), "--chat-template")
        own = self.directory / "chat_template.jinja"
        if own.is_file():
            return _read_text(own, "model")
        template = self.tokenizer.get("chat_template")
        if isinstance(template, list):
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None


def _token_ids(value: object, name: str) -> list[int]:
    ids: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ValueError(f"{name} must be a token id or a list of token ids, not {value!r}")
    return ids


def _read_json(path: Path) -> Mapping[str, Any]:
    return read_object(path) if path.is_file() else {}


def _read_text(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: {path} cannot be read: {error}") from error
