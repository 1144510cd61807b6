"""Chat messages → one prompt text, by the Jinja template that comes with the model."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
import jinja2.nodes
import jinja2.parser
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.model_files import SPECIAL_TOKENS

# Written after the final message's text, to find that text in the prompt. A template that strips texts takes the
# space away again, and then takes spaces away that are the message's, too.
_END_MARK = "[[END OF THE FINAL MESSAGE]]"


class ChatTemplateError(ValueError):
    """The template refused the messages, or failed on them; `param` is the field that the error is about."""

    def __init__(self, message: str, param: str = "messages") -> None:
        super().__init__(message)
        self.param = param


_OWN_VARIABLES = MappingProxyType({"messages": (), "tools": None, "documents": None, "add_generation_prompt": True})


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
        self._reserved = {*_OWN_VARIABLES, *SPECIAL_TOKENS, *environment.globals}

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Return the prompt that asks for the assistant's next message, or for the rest of the final one.

        Args:
            messages: the conversation so far.
            add_generation_prompt: end with the beginning of an assistant's message.
            continue_final_message: end with the final message's text, so that it goes on.
            kwargs: more variables for the template.

        Raises:
            ChatTemplateError: with the template's own words where it refuses the messages, and naming the field.
        """
        for name in kwargs:
            if name in self._reserved:
                raise ChatTemplateError("is the template's own and cannot be set", f"chat_template_kwargs.{name}")
        variables = {**kwargs, **_OWN_VARIABLES, **self._special_tokens, "add_generation_prompt": add_generation_prompt}
        if not continue_final_message:
            return self._render(messages, variables)
        if add_generation_prompt:
            message = "needs add_generation_prompt to be false: the final message cannot go on before a new one"
            raise ChatTemplateError(message, "continue_final_message")
        *before, final = messages
        marked = {**final, "content": f"{final['content']}{_END_MARK} "}
        return _until_mark(self._render([*before, marked], variables), final["content"])

    def _render(self, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any]) -> str:
        try:
            return self._template.render({**variables, "messages": messages})
        except ChatTemplateError:
            raise
        except Exception as error:  # a template is a program of others: whatever it raises is about these messages
            raise ChatTemplateError(f"the chat template failed: {type(error).__name__}: {error}") from error


def _until_mark(prompt: str, final_text: str) -> str:
    """Return `prompt` up to the end of the final message's text.

    Raises:
        ChatTemplateError: when that text is not there as it was written, spaces around it aside.
    """
    before, mark, after = prompt.rpartition(_END_MARK)
    kept = before if after.startswith(" ") else before.rstrip()
    if not mark or not before.rstrip().endswith(final_text.strip()):
        message = "the chat template does not keep the final message's text as it is"
        raise ChatTemplateError(message, "continue_final_message")
    return kept


def _to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    """Unlike Jinja's own filter this one does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


def _raise_exception(message: str) -> NoReturn:
    raise ChatTemplateError(str(message))


def _strftime_now(layout: str) -> str:
    return datetime.now().astimezone().strftime(layout)
