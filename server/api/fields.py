"""Building blocks of the request models: prompts, stop strings, and fields that only their neutral value may have."""

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, TypeGuard

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from server.limits import MAX_ITEMS, MAX_LOGIT_BIAS, MAX_TOKEN_IDS

MAX_SHOWN = 40  # characters of what a user wrote, in an error
_TOKEN_ID = re.compile(r"0|-?[1-9][0-9]{0,18}")  # one spelling of each: a key must not appear twice


class RequestModel(BaseModel):
    """Types are not converted, and a field that nobody knows is an error."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, data: object) -> object:
        """Refuse the first unknown key: pydantic itself would collect them all, and cannot name one that is no text."""
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields:
                raise PydanticCustomError("extra_forbidden", "is not known", {"field": shortened(key)})
        return data


def shortened(text: str) -> str:
    """Return the beginning of what a user wrote, for an error; halves of surrogate pairs are written as escapes."""
    begin = text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"
    return begin.encode("utf-8", "backslashreplace").decode()


_JSON_TYPES = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def shown(value: object) -> str:
    """Return a value that a user wrote, for an error: a text's beginning, or of which type it is."""
    return repr(shortened(value)) if isinstance(value, str) else _JSON_TYPES[type(value)]


# typing caches Annotated types by equality, for which 0 and False are one.
@dataclass(frozen=True, eq=False)
class Neutral:
    """Marks a field that is not supported: null and these values say nothing and are accepted, others are an error."""

    values: tuple[Any, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.values], "description": "Not supported: only these values, without effect."}

    def _check(self, value: object) -> None:
        if value is None or any(_same(value, neutral) for neutral in self.values):
            return
        allowed = ", ".join(map(json.dumps, (None, *self.values)))
        message = "is not supported; leave it out, or send one of {allowed}"
        raise PydanticCustomError("unsupported_value", message, {"allowed": allowed})


def _same(value: object, neutral: object) -> bool:
    """Equality that tells false from 0."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def neutral(*values: Any) -> Any:
    """Return the annotation's mark for an unsupported field with these neutral values besides null."""
    return Neutral(values)


def invalid(message: str) -> PydanticCustomError:
    """Return an error that pydantic attributes to the field being validated."""
    # As a template's argument, since the message may hold braces that a user wrote.
    return PydanticCustomError("invalid_value", "{message}", {"message": message})


def check_count(items: object, most: int) -> None:
    """Refuse a list or object of more than `most` members, whatever they are."""
    if isinstance(items, list | dict) and len(items) > most:
        raise invalid(f"holds {len(items)} items; at most {most} are possible")


def at_most(most: int) -> BeforeValidator:
    """Return the annotation's mark for a list that is refused as a whole when it holds more than `most` items."""

    def check(items: object) -> object:
        check_count(items, most)
        return items

    return BeforeValidator(check)


PromptInput = str | list[str] | list[int] | list[list[int]]


def _check_text(value: str) -> str:
    """Return `value` if UTF-8 can express it: JSON can escape half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise invalid("holds half of a surrogate pair, which is not a character") from None
    return value


def _check_not_empty(value: str) -> str:
    if not value:
        raise invalid("must not be empty")
    return value


def _is_text(value: object) -> TypeGuard[str]:
    """Whether `value` is a string; one that is no text is an error."""
    if not isinstance(value, str):
        return False
    _check_text(value)
    return True


def _are_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def parse_prompt(value: object) -> list[str] | list[list[int]]:
    """Return texts or lists of ids from a text, texts, ids, or lists of ids.

    Raises:
        PydanticCustomError: when it is none of these.
    """
    if _is_text(value):
        return [value]
    check_count(value, MAX_TOKEN_IDS)
    if _are_ids(value):
        return [value]
    check_count(value, MAX_ITEMS)
    if not isinstance(value, list):
        raise invalid("must be a string, a list of strings, a list of token ids, or a list of lists of token ids")
    if not value:
        raise invalid("must not be empty")
    if all(_is_text(item) for item in value) or all(_are_ids(item) for item in value):
        return value
    if [] in value:
        raise invalid("holds an empty list of token ids")
    raise invalid("must hold only strings, only token ids, or only lists of token ids")


def parse_content(value: object) -> str:
    """Return a message's text from a string or from text parts, which become its paragraphs.

    Raises:
        PydanticCustomError: naming the part that is no text.
    """
    if _is_text(value):
        return value
    if not isinstance(value, list) or not value:
        raise invalid("must be a string or a list of text parts")
    check_count(value, MAX_ITEMS)
    return "\n".join(_parse_part(index, part) for index, part in enumerate(value))


def _parse_part(index: int, part: object) -> str:
    if not isinstance(part, dict):
        raise invalid(f"part {index} must be an object")
    if part.get("type") != "text":
        kind = shown(part["type"]) if "type" in part else "missing"
        raise invalid(f"the type of part {index} is {kind}; only 'text' is supported")
    if not _is_text(part.get("text")) or part.keys() != {"type", "text"}:
        raise invalid(f"part {index} must hold a string named text, and nothing else")
    return str(part["text"])


def parse_stop(value: object) -> object:
    """Return a list from one stop string, a list of them, or null; what is in it is checked by its type."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def none_is_empty(value: object) -> object:
    """Return an empty list for null."""
    return [] if value is None else value


def parse_logit_bias(value: object) -> dict[int, float]:
    """Return the bias of each token id.

    Raises:
        PydanticCustomError: naming the entry that is none.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid("must be an object with token ids as keys and numbers as values")
    check_count(value, MAX_ITEMS)
    return {_token_id(key): _bias(key, bias) for key, bias in value.items()}


def _token_id(key: str) -> int:
    if not _TOKEN_ID.fullmatch(key):
        raise invalid(f"key {shown(key)} is no token id")
    return int(key)


def _bias(key: str, bias: Any) -> float:
    is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
    if is_number and -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
        return float(bias)
    raise invalid(f"of token {key} must be a number between {-MAX_LOGIT_BIAS:g} and {MAX_LOGIT_BIAS:g}")


def parse_variables(value: object) -> dict[str, Any]:
    """Return an object's members; null has none.

    Raises:
        PydanticCustomError: when `value` is no object, or something in it is no text.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid("must be an object")
    try:
        _check_text(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        raise invalid("is nested too deeply") from None
    return value


class TextPart(BaseModel):
    """One part of a message's content."""

    type: Annotated[str, Field(pattern="^text$")]
    text: str


Text = Annotated[str, AfterValidator(_check_text)]
Prompt = Annotated[list[str] | list[list[int]], PlainValidator(parse_prompt, json_schema_input_type=PromptInput)]
Content = Annotated[str, PlainValidator(parse_content, json_schema_input_type=str | list[TextPart])]
StopString = Annotated[Text, AfterValidator(_check_not_empty)]
Stop = Annotated[
    list[StopString],
    Field(fail_fast=True),
    at_most(MAX_ITEMS),
    BeforeValidator(parse_stop, json_schema_input_type=str | list[str] | None),
]
LogitBias = Annotated[
    dict[int, float], PlainValidator(parse_logit_bias, json_schema_input_type=dict[str, float] | None)
]
TokenIds = Annotated[
    list[int],
    Field(fail_fast=True),
    at_most(MAX_ITEMS),
    BeforeValidator(none_is_empty, json_schema_input_type=list[int] | None),
]
Variables = Annotated[dict[str, Any], PlainValidator(parse_variables, json_schema_input_type=dict[str, Any] | None)]
