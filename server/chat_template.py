"""Chat messages → one prompt text, by the Jinja template that comes with the model."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.nodes
import jinja2.parser
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplateError(ValueError):
    """The template refused the messages, or failed on them."""


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  (an instance attribute in jinja2's typing)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template.

    Raises:
        ValueError: when `source` is not a template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt that asks for the assistant's next message.

        Raises:
            ChatTemplateError: with the template's own words where it refuses the messages.
        """
        try:
            return self._template.render(
                **self._special_tokens, messages=messages, tools=None, documents=None, add_generation_prompt=True
            )
        except ChatTemplateError:
            raise
        except Exception as error:  # a template is a program of others: whatever it raises is about these messages
            raise ChatTemplateError(f"the chat template failed: {type(error).__name__}: {error}") from error


def _to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    """Unlike Jinja's own filter this one does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


def _raise_exception(message: str) -> NoReturn:
    raise ChatTemplateError(str(message))


def _strftime_now(layout: str) -> str:
    return datetime.now().astimezone().strftime(layout)
