"""What a hostile or broken chat template can do: nothing but fail, and that soon."""

import time

import pytest

from server.text.chat_template import ChatTemplate, ChatTemplateError
from server.text.template_sandbox import MAX_LENGTH

MESSAGES = [{"role": "user", "content": "hi"}]

REFUSED = [
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ messages['__class__']['__mro__'][1] }}",
    "{{ raise_exception.__globals__['__builtins__'] }}",
    "{{ strftime_now.__globals__.os.system('true') }}",
    "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment.globals.__class__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ (messages | attr('__class__')).__mro__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__call__.__globals__ }}",
    "{% for x in messages %}{{ loop.__class__.__init__.__globals__ }}{% endfor %}",
    "{% set _ = messages.append('x') %}",
    "{% set _ = messages[0].update({'role': 'system'}) %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'base' %}",
]
SILENT = [
    "{{ messages['__class__'] }}",
    "{{ messages | attr('__class__') | attr('__base__') }}",
    "{{ '{m.__class__}'.format_map({'m': messages}) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(messages) }}",
    "{{ messages | map(attribute='__class__') | join }}",
]


@pytest.mark.parametrize("source", REFUSED)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"SecurityError|UndefinedError|no loader"):
        ChatTemplate(source, {}).render(MESSAGES)
    assert MESSAGES == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("source", SILENT)
def test_what_is_outside_the_sandbox_has_no_text(source: str) -> None:
    assert ChatTemplate(source, {}).render(MESSAGES) == ""


def loop(variable: str, items: str, body: str) -> str:
    return "{% for " + variable + " in " + items + " %}" + body + "{% endfor %}"


ENDLESS = {
    "nested loops": loop("_", "range(99999)", loop("_", "range(99999)", "")),
    "loops that skip": loop("_", "range(99999)", loop("b", "range(99999) if b < 0", "")),
    "filters in a loop": loop("_", "range(99999)", "{% set _ = range(9999) | list | sum %}"),
    "loops over a variable": loop("_", "many", loop("_", "many", loop("_", "many", ""))),
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "a recursive loop": loop("_", "[0, 0] recursive", "{% if loop.depth < 99 %}{{ loop([0, 0]) }}{% endif %}"),
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_does_not_end_is_ended(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.text.chat_template.MAX_RENDER_SECONDS", 0.2)
    begin = time.perf_counter()
    with pytest.raises(ChatTemplateError, match="not done after"):
        ChatTemplate(source + "{{ many }}", {}).render(MESSAGES, kwargs={"many": list(range(5000))})
    assert time.perf_counter() - begin > 0.2


TEXT, LIST = "{% set ns = namespace(x='x') %}", "{% set ns = namespace(x=[0]) %}"
MEGABYTE = "{% set t = 'x' * 1000000 %}"
LARGE = {
    "a text times a number": "{{ 'x' * n }}",
    "a number times a text": "{{ n * 'x' }}",
    "a list times a number": "{{ ([0] * n) | length }}",
    "text that doubles by +": TEXT + loop("_", "range(99)", "{% set ns.x = ns.x + ns.x %}"),
    "text that doubles by ~": TEXT + loop("_", "range(99)", "{% set ns.x = ns.x ~ ns.x %}"),
    "a list that doubles": LIST + loop("_", "range(99)", "{% set ns.x = ns.x + ns.x %}"),
    "output": MEGABYTE + loop("_", "range(99)", "{{ t }}"),
    "output of a macro": MEGABYTE
    + "{% macro f() %}"
    + loop("_", "range(99)", "{{ t }}")
    + "{% endmacro %}{% set _ = f() %}",
    "a block": MEGABYTE + "{% set _ %}" + loop("_", "range(99)", "{{ t }}") + "{% endset %}",
    "a power": "{{ 9 ** n }}",
    "a range": "{{ range(n) | list }}",
}


@pytest.mark.parametrize("source", LARGE.values(), ids=LARGE)
def test_a_template_that_makes_too_much_is_ended(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.text.chat_template.MAX_RENDER_SECONDS", 60.0)
    with pytest.raises(ChatTemplateError, match=r"longer than|not supported|Range too big"):
        ChatTemplate(source + "{% set _ = n %}", {}).render(MESSAGES, kwargs={"n": 10**12})


def test_a_text_of_the_greatest_length_is_made() -> None:
    template = ChatTemplate("{{ 'x' * n }}", {})
    assert len(template.render(MESSAGES, kwargs={"n": MAX_LENGTH})) == MAX_LENGTH
    with pytest.raises(ChatTemplateError, match="longer"):
        template.render(MESSAGES, kwargs={"n": MAX_LENGTH + 1})


def test_a_macro_that_calls_itself_for_ever_fails() -> None:
    with pytest.raises(ChatTemplateError, match="RecursionError"):
        ChatTemplate("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", {}).render(MESSAGES)


def test_a_request_cannot_move_the_deadline() -> None:
    with pytest.raises(ChatTemplateError, match="no such variable"):
        ChatTemplate("{{ deadline }}", {}).render(MESSAGES, kwargs={"the deadline": 1e9})
