"""API keys: one, or a file of several that have names and limits. What is said of a wrong one never shows it."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import yaml

from server.options import DuplicateKeyError, UniqueKeyLoader

ONLY_KEY = "default"  # name of the key of a service that has one
ANONYMOUS = "anonymous"  # who sends a request where no key is asked for
MOST = 10**6  # of either limit
_NO_KEYS = ("[]", "{}")  # what programs write for none: everybody would guess such a key
_VISIBLE_ASCII = re.compile(r"[!-~]+")
_ONE_WORD = "must be one word of visible ASCII characters, since clients can send no others"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class APIKey:
    """A key, and what those who have it may do; None is as much as they like."""

    name: str  # in metrics
    key: str = field(repr=False)
    requests_per_minute: int | None = None  # in any 60 seconds
    max_concurrent_requests: int | None = None  # from a request's arrival to the end of its answer


_FIELDS = tuple(item.name for item in fields(APIKey))


def parse_key(key: str) -> tuple[APIKey, ...]:
    """Return the one key that there is.

    Raises:
        ValueError: if it is none.
    """
    return (APIKey(ONLY_KEY, _checked(key)),)


def parse_keys(text: str) -> tuple[APIKey, ...]:
    """Return the keys of a file: of a plain key, or of a YAML list of `name`, `key` and limits.

    Raises:
        ValueError: naming the entry of the list that is none, never what is in it.
    """
    line = text.removesuffix("\n").removesuffix("\r")
    if not line or (_VISIBLE_ASCII.fullmatch(line) and not line.startswith("[{") and line not in _NO_KEYS):
        return parse_key(line)
    keys = tuple(_entry(number, entry) for number, entry in enumerate(_read_list(text), 1))
    for name in ("name", "key"):
        _check_unique(name, [getattr(key, name) for key in keys])
    return keys


def _read_list(text: str) -> Sequence[object]:
    try:
        content = yaml.load(text, UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"is neither one word nor YAML{f', as of line {mark.line + 1}' if mark else ''}") from None
    except (yaml.YAMLError, RecursionError):
        raise ValueError("is neither one word nor YAML") from None
    except DuplicateKeyError:
        raise ValueError("a field of one of the keys is written twice") from None
    if not isinstance(content, list) or not content:
        raise ValueError(f"{_ONE_WORD}, or a YAML list of keys with names")
    return content


def _entry(number: int, entry: object) -> APIKey:
    if not isinstance(entry, dict) or not {"name", "key"} <= entry.keys() <= {*_FIELDS}:
        raise ValueError(f"key {number} must have name and key, and may have {' and '.join(_FIELDS[2:])}; nothing else")
    try:
        return APIKey(**{name: _PARSERS[name](name, value) for name, value in entry.items()})
    except ValueError as error:
        raise ValueError(f"key {number}: {error}") from None


def _parse_name(_: str, value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError("name must be 1 to 64 letters, digits, dots, dashes and underscores")
    return value


def _parse_key(_: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("key must be text: put it in quotes")
    try:
        return _checked(value)
    except ValueError as error:
        raise ValueError(f"key {error}") from None


def _parse_limit(name: str, value: object) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST):
        return value
    raise ValueError(f"{name} must be a whole number between 1 and {MOST}")


_PARSERS: dict[str, Callable[[str, object], Any]] = {
    "name": _parse_name,
    "key": _parse_key,
    "requests_per_minute": _parse_limit,
    "max_concurrent_requests": _parse_limit,
}


def _checked(key: str) -> str:
    if not key:
        raise ValueError("is empty")
    if not _VISIBLE_ASCII.fullmatch(key):
        raise ValueError(_ONE_WORD)
    return key


def _check_unique(name: str, values: Iterable[str]) -> None:
    numbers: dict[str, int] = {}
    for number, value in enumerate(values, 1):
        if value in numbers:
            raise ValueError(f"keys {numbers[value]} and {number} have the same {name}")
        numbers[value] = number
