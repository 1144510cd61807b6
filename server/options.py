"""Options from four places, the first that speaks wins: command line, environment, YAML file, default.

The command line is generated from the config dataclasses. Values arrive here as text (or as what YAML makes of it), are
turned into the field's type, and every error is one line that names the option and the place it came from.
"""

import argparse
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from engine.protocol.units import format_bytes
from server.environment import ENVIRONMENT_PREFIX

SIZE_UNITS = {"": 1, "b": 1} | {
    letter + suffix: base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("", 1024), ("b", 1000), ("ib", 1024))
}
MAX_SIZE = 2**63
MAX_DIGITS = 100  # of a whole number: more than any option takes, and not too many to be shown
TRUE_WORDS, FALSE_WORDS = ("true", "yes", "on", "1"), ("false", "no", "off", "0")

C = TypeVar("C")


@dataclass(frozen=True)
class Option:
    """One field of a config dataclass, as people write it."""

    field: "Field[Any]"
    type: type

    @property
    def name(self) -> str:
        """The field's name, which is also the key in a YAML file."""
        return self.field.name

    @property
    def flag(self) -> str:
        """The long spelling on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable."""
        return ENVIRONMENT_PREFIX + self.name.upper()

    def parse(self, value: object) -> object:
        """Return `value` in the field's type.

        Raises:
            ValueError: saying what was expected.
        """
        if self.field.metadata["secret"] and not isinstance(value, str):
            raise ValueError("must be text")  # errors of other options show the value
        if self.field.metadata["unit"] == "bytes":
            return parse_size(value)
        return _PARSERS[self.type](value)

    @property
    def default(self) -> str:
        """The default as people write it; empty when there is none."""
        default: Any = self.field.default
        if self.field.metadata["unit"] == "bytes" and default is not None:
            return format_bytes(default)
        if self.type is tuple:
            return ",".join(default)
        if self.type is float and default is not None:
            return f"{default:g}"
        return "" if default is None else str(default)


@dataclass(frozen=True)
class Value:
    """What somebody wrote for an option, and where."""

    raw: object
    source: str


def options_of(config: type) -> list[Option]:
    """Return the options that the fields of a config dataclass declare."""
    hints = get_type_hints(config)
    return [_option(item, hints[item.name]) for item in fields(config)]


def _option(item: "Field[Any]", hint: Any) -> Option:
    if get_origin(hint) is tuple:
        return Option(item, tuple)
    if isinstance(hint, UnionType):
        inner = next(argument for argument in get_args(hint) if argument is not type(None))
        return Option(item, inner)
    return Option(item, hint)


def parse_size(value: object) -> int:
    """Return a number of bytes from 4GiB, 512MB, 1e9 or a plain number; K, M, G, T alone are powers of 1024."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < MAX_SIZE:
        return value
    match = re.fullmatch(r"\s*(\d+\.?\d*(?:[eE]\+?\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    unit = SIZE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"must be a size such as 4GiB, 512MB or 1e9, not {value!r}")
    size = float(match[1]) * unit
    if size >= MAX_SIZE:
        raise ValueError(f"must be less than 2**63 bytes, not {value!r}")
    return int(size)


def _parse_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {value!r}")
    return value


def _parse_whole_number(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(rf"\s*[+-]?\d{{1,{MAX_DIGITS}}}\s*", value):
        return int(value)
    raise ValueError(f"must be a whole number, not {value!r}")


def _parse_number(value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_text_of_one = isinstance(value, str) and re.fullmatch(r"\s*[+-]?(\d{1,100}\.?\d{0,100}|\.\d{1,100})\s*", value)
    if is_number or is_text_of_one:
        return float(str(value))
    raise ValueError(f"must be a number, not {value!r}")


def _parse_switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise ValueError(f"must be true or false, not {value!r}")
    return word in TRUE_WORDS


def _parse_list(value: object) -> tuple[str, ...]:
    """Return the words of `a, b` or, from a file, of a list."""
    words = value if isinstance(value, list) else _parse_text(value).split(",")
    if not all(isinstance(word, str) for word in words):
        raise ValueError(f"must be a list of texts, not {value!r}")
    return tuple(word.strip() for word in words if word.strip())


_PARSERS: Mapping[type, Callable[[object], object]] = {
    str: _parse_text,
    tuple: _parse_list,
    int: _parse_whole_number,
    float: _parse_number,
    bool: _parse_switch,
}
_METAVARS: Mapping[type, str] = {str: "TEXT", tuple: "TEXT,TEXT", int: "N", float: "NUMBER"}


def add_options(
    parser: argparse.ArgumentParser, title: str, options: Iterable[Option], *, have_variables: bool = True
) -> None:
    """Add a group of flags to `parser`; what nobody wrote does not appear in its result.

    Args:
        parser: of a command.
        title: of the group.
        options: to add.
        have_variables: whether environment variables set them too.
    """
    group = parser.add_argument_group(title)
    for option in options:
        spellings = [option.field.metadata["short"]] if option.field.metadata["short"] else []
        group.add_argument(
            *spellings, option.flag, dest=option.name, help=_help(option, have_variables), **_argument(option)
        )


def _argument(option: Option) -> dict[str, Any]:
    if option.type is bool:
        return {"action": argparse.BooleanOptionalAction, "default": argparse.SUPPRESS}
    words = "|".join(option.field.metadata["choices"])
    return {"metavar": words or _kind(option), "default": argparse.SUPPRESS}


def _kind(option: Option) -> str:
    unit = option.field.metadata["unit"]
    if unit == "bytes":
        return "SIZE"
    return "N,N" if unit and option.type is tuple else _METAVARS[option.type]


def _help(option: Option, has_variable: bool) -> str:
    default = [f"default {option.default}"] if option.default else []
    words = "; ".join(default + [option.variable] * has_variable)
    return f"{option.field.metadata['help']}{f' ({words})' if words else ''}".replace("%", "%%")


def from_command_line(namespace: argparse.Namespace, options: Iterable[Option]) -> dict[str, Value]:
    """Return what was written on the command line."""
    written = vars(namespace)
    return {option.name: Value(written[option.name], "command line") for option in options if option.name in written}


def from_environment(environment: Mapping[str, str], options: Iterable[Option]) -> dict[str, Value]:
    """Return what `RYZANSTEIN_*` variables say."""
    return {
        option.name: Value(environment[option.variable], f"environment {option.variable}")
        for option in options
        if option.variable in environment
    }


def unknown_variables(environment: Mapping[str, str], options: Iterable[Option]) -> list[str]:
    """Return the `RYZANSTEIN_*` variables that no option reads."""
    known = {option.variable for option in options} | {ENVIRONMENT_PREFIX + "CONFIG"}
    return sorted(name for name in environment if name.startswith(ENVIRONMENT_PREFIX) and name not in known)


def from_file(path: str, options: Iterable[Option]) -> dict[str, Value]:
    """Return what a YAML file says. Keys are the options' names with dashes or underscores.

    Raises:
        ValueError: naming the file, and the key in it, that cannot be used.
    """
    known = {option.name for option in options}
    found: dict[str, Value] = {}
    for key, raw in _read_mapping(path).items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ValueError(f"{path}: {key} is not an option")
        if name in found:
            raise ValueError(f"{path}: {key} is written twice")
        if raw is not None:
            found[name] = Value(raw, f"file {path}")
    return found


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key may appear once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return what a mapping holds."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise DuplicateKeyError(f"{key} is written twice")
        return super().construct_mapping(node, deep)


class DuplicateKeyError(ValueError):
    """A key appears twice."""


def _read_mapping(path: str) -> dict[object, object]:
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeyLoader)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {path}: not UTF-8 text") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from error
    except DuplicateKeyError as error:
        raise ValueError(f"--config {path}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: must be a list of `option: value` lines")
    return content


def build(config: Callable[..., C], options: Iterable[Option], *sources: Mapping[str, Value]) -> C:
    """Return a config from the first of `sources` that has each option, else its default.

    Raises:
        ValueError: one line naming the option and where its value came from.
    """
    values: dict[str, Value] = {}
    parsed: dict[str, object] = {}
    for option in options:
        value = next((source[option.name] for source in sources if option.name in source), None)
        if value is None:
            continue
        values[option.name] = value
        try:
            parsed[option.name] = option.parse(value.raw)
        except ValueError as error:
            raise ValueError(f"{option.flag} {error} ({value.source})") from error
    try:
        return config(**parsed)
    except ValueError as error:
        raise ValueError(f"{error}{_origin(str(error), values)}") from error


def _origin(message: str, values: Mapping[str, Value]) -> str:
    """Return the places that the options named in `message` came from, in brackets."""
    named = [flag[2:].replace("-", "_") for flag in re.findall(r"--[a-z][a-z-]*", message)]
    sources = dict.fromkeys(values[name].source for name in named if name in values)
    return f" ({', '.join(sources)})" if sources else ""
