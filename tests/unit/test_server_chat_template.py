from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from server.model_files import ModelFiles
from server.text.chat_template import ChatTemplate, ChatTemplateError
from tests.tokenizers import FAMILIES, Family

MESSAGES = [{"role": "system", "content": "be <kind>"}, {"role": "user", "content": "hi\n  there"}]
TEMPLATES = {
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "json and date": "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }} {{ strftime_now('%Y') }}",
    "training marks": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "joined texts": "{{ 1 ~ messages[0].role ~ messages[0].nothing ~ none ~ ('a' + 'b' * 3) ~ [1] * 2 ~ (2 * 3 + 1) }}",
    "macro": "{% macro say(m) %}{% set t %}{{ m.role }}:{% endset %}{{ t }}{{ caller() }}{% endmacro %}"
    "{% for m in messages if m.role == 'user' %}{% call say(m) %}{{ loop.last }}{% endcall %}{% endfor %}",
    "recursive": "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
}


def messages_of(roles: Any, spaces: str = "") -> list[dict[str, str]]:
    return [{"role": role, "content": f"{spaces}text {i}\nof é {role}{spaces}"} for i, role in enumerate(roles)]


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_prompts_are_those_of_transformers(source: str) -> None:
    expected: Any = render_jinja_template([MESSAGES], chat_template=source, add_generation_prompt=True, bos_token="<s>")
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES) == expected[0][0]


# --- published formats -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]()


@pytest.fixture(scope="module")
def ours(family: Family, tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    files = ModelFiles.read(str(family.write(tmp_path_factory.mktemp("ours"))))
    source = files.chat_template(None)
    assert source == family.chat_template
    return ChatTemplate(source, files.special_tokens())


@pytest.fixture(scope="module")
def theirs(family: Family, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    loaded = PreTrainedTokenizerFast.from_pretrained(family.write(tmp_path_factory.mktemp("theirs")))
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.mark.parametrize("spaces", ["", "  ", "\n"])
def test_a_familys_prompts_are_those_of_transformers(
    family: Family, ours: ChatTemplate, theirs: PreTrainedTokenizerFast, spaces: str
) -> None:
    for roles in family.conversations:
        messages = messages_of(roles, spaces)
        for add in (True, False):
            for kwargs in ({}, family.kwargs):
                expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add, **kwargs)
                assert ours.render(messages, add_generation_prompt=add, kwargs=kwargs) == expected


@pytest.mark.parametrize("spaces", ["", "  ", "\n"])
def test_a_familys_continued_messages_are_those_of_transformers(
    family: Family, ours: ChatTemplate, theirs: PreTrainedTokenizerFast, spaces: str
) -> None:
    for roles in [*family.conversations, ("user", "assistant")]:
        messages = messages_of(roles, spaces)
        prompt = ours.render(messages, add_generation_prompt=False, continue_final_message=True)
        assert prompt == theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        assert prompt.rstrip().endswith(messages[-1]["content"].strip())


def test_a_template_that_thinks_can_be_told_not_to() -> None:
    template = ChatTemplate(FAMILIES["Qwen 3"]().chat_template, {})
    on, off = (template.render(MESSAGES, kwargs={"enable_thinking": thinking}) for thinking in (True, False))
    assert off == on + "<think>\n\n</think>\n\n"


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_templates_own_words_reach_the_caller() -> None:
    template = ChatTemplate("{{ raise_exception('roles must {alternate}') }}", {})
    with pytest.raises(ChatTemplateError, match=r"^roles must \{alternate\}$") as raised:
        template.render(MESSAGES)
    assert raised.value.param == "messages"


def test_a_template_that_fails_on_the_messages_is_the_callers_error() -> None:
    with pytest.raises(ChatTemplateError, match="failed"):
        ChatTemplate("{{ messages[7].content.x }}", {}).render(MESSAGES)


def test_a_template_that_cannot_be_parsed_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="chat template"):
        ChatTemplate("{% for %}", {})


def test_a_final_message_cannot_go_on_where_another_begins() -> None:
    with pytest.raises(ChatTemplateError, match="add_generation_prompt") as raised:
        ChatTemplate("{{ messages }}", {}).render(MESSAGES, continue_final_message=True)
    assert raised.value.param == "continue_final_message"


@pytest.mark.parametrize("change", ["[:5]", " | upper", " | replace('there', 'you')", "[-3:]"])
def test_a_final_message_that_the_template_changes_cannot_go_on(change: str) -> None:
    template = ChatTemplate("{{ (messages[-1].content" + change + ") }}", {})
    with pytest.raises(ChatTemplateError, match="does not keep") as raised:
        template.render(MESSAGES, add_generation_prompt=False, continue_final_message=True)
    assert raised.value.param == "continue_final_message"


def test_what_follows_the_final_message_is_left_out() -> None:
    template = ChatTemplate("{{ messages[-1].content }} {{ eos_token }} {{ messages[0].content }}", {"eos_token": "E"})
    prompt = template.render(MESSAGES, add_generation_prompt=False, continue_final_message=True)
    assert prompt == MESSAGES[-1]["content"]


@pytest.mark.parametrize(
    "name",
    ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "bos_token", "range"],
)
def test_variables_of_the_service_are_not_the_requests_to_set(name: str) -> None:
    source = "{{ bos_token }}{{ messages }}{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ range(2) }}"
    with pytest.raises(ChatTemplateError) as raised:
        ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES, kwargs={name: "x"})
    assert raised.value.param == f"chat_template_kwargs.{name}"


def test_a_variable_that_the_template_lacks_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match="no such variable") as raised:
        ChatTemplate("{% set mine = 1 %}{{ messages }}", {}).render(MESSAGES, kwargs={"mine": 2})
    assert raised.value.param == "chat_template_kwargs.mine"
