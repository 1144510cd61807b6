from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from server.chat_template import ChatTemplate, ChatTemplateError

MESSAGES = [{"role": "system", "content": "be <kind>"}, {"role": "user", "content": "hi\n  there"}]
TEMPLATES = {
    "llama 2": """\
{% for message in messages %}{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}
{% else %}{{ '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>' }}{% endif %}{% endfor %}""",
    "llama 3": """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "qwen": """\
{%- if tools %}tools{%- endif %}
{% for message in messages %}
    {% if loop.index > 5 %}{% break %}{% endif %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
<|im_start|>assistant
""",
    "json and date": "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }} {{ strftime_now('%Y') }}",
    "training marks": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
}


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_prompts_are_those_of_transformers(source: str) -> None:
    expected: Any = render_jinja_template([MESSAGES], chat_template=source, add_generation_prompt=True, bos_token="<s>")
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES) == expected[0][0]


def test_a_templates_own_words_reach_the_caller() -> None:
    template = ChatTemplate("{{ raise_exception('roles must {alternate}') }}", {})
    with pytest.raises(ChatTemplateError, match=r"^roles must \{alternate\}$"):
        template.render(MESSAGES)


def test_a_template_that_fails_on_the_messages_is_the_callers_error() -> None:
    with pytest.raises(ChatTemplateError, match="failed"):
        ChatTemplate("{{ messages[7].content.x }}", {}).render(MESSAGES)


def test_a_template_cannot_leave_its_sandbox() -> None:
    with pytest.raises(ChatTemplateError, match="SecurityError"):
        ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {}).render(MESSAGES)


def test_a_template_that_cannot_be_parsed_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="chat template"):
        ChatTemplate("{% for %}", {})
