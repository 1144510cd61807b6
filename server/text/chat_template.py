"""Chat messages → one prompt text, by the Jinja template that comes with the model."""

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
from jinja2.meta import find_undeclared_variables

from server.text.template_sandbox import DEADLINE, MAX_RENDER_SECONDS, TemplateSandbox

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", *SPECIAL_TOKENS)

# Written after the final message's text, to find that text in the prompt.
_END_MARK = "[[END OF THE FINAL MESSAGE]]"


class ChatTemplateError(ValueError):
    """The template refused the messages, or failed on them; `param` is the field that the error is about."""

    def __init__(self, message: str, param: str = "messages") -> None:
        super().__init__(message)
        self.param = param


class ChatTemplate:
    """A compiled template.

    Raises:
        ValueError: when `source` is not a template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        sandbox = TemplateSandbox()
        sandbox.filters["tojson"] = _to_json
        sandbox.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        try:
            tree = sandbox.parse(source)
            self._variables = find_undeclared_variables(tree) - {*_OWN_VARIABLES, *sandbox.globals}
            self._template = sandbox.compile_bounded(tree)
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template: {error}") from error
        self._special_tokens = dict(special_tokens)

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
            kwargs: values of the template's own variables, such as `enable_thinking`.

        Raises:
            ChatTemplateError: with the template's own words where it refuses the messages, or about another field.
        """
        self._check_names(kwargs)
        variables = {**kwargs, "add_generation_prompt": add_generation_prompt}
        if not continue_final_message:
            return self._render(messages, variables)
        if add_generation_prompt:
            message = "the final message cannot go on where another begins: set add_generation_prompt to false"
            raise ChatTemplateError(message, "continue_final_message")
        *before, final = messages
        # A template that strips texts takes the space after the mark away, and the message's own last ones as well.
        marked = {**final, "content": f"{final['content']}{_END_MARK} "}
        return _until_mark(self._render([*before, marked], variables), final["content"])

    def _check_names(self, kwargs: Mapping[str, Any]) -> None:
        for name in kwargs:
            if name not in self._variables:
                taken = name in (*_OWN_VARIABLES, "continue_final_message")
                reason = "is not set this way" if taken else "the model's chat template has no such variable"
                raise ChatTemplateError(reason, f"chat_template_kwargs.{name}")

    def _render(self, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any]) -> str:
        own = {"messages": messages, "tools": None, "documents": None, **self._special_tokens}
        deadline = time.perf_counter() + MAX_RENDER_SECONDS
        try:
            return self._template.render({**variables, **own, DEADLINE: deadline})
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
    if not mark or not before.rstrip().endswith(final_text.strip()):
        message = "the chat template does not keep the final message's text as it is"
        raise ChatTemplateError(message, "continue_final_message")
    return before if after.startswith(" ") else before.rstrip()


def _to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    """Unlike Jinja's own filter this one does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


def _raise_exception(message: str) -> NoReturn:
    raise ChatTemplateError(str(message))


def _strftime_now(layout: str) -> str:
    return datetime.now().astimezone().strftime(layout)
