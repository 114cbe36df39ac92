"""Who speaks in a chat: the system, tools, and roles that no template knows."""

import pytest
from datasets import Dataset
from test_chat_turns import make_tokenizer, shown

from fspad.trainer.data import prepare_dataset

TOOLS = (
    "{% for m in messages %}<{{ m.role }}> {% if m.content %}{{ m.content }} {% endif %}"
    "{% for call in m.tool_calls or [] %}<call> {{ call.function.arguments.values() | join(' ') }} {% endfor %}</s> "
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
BLOCKS = (
    TOOLS.replace("{% if m.content", "{% if m.role != 'assistant' %}{{ m.content }} </s> {% else %}{% generation %}{% if m.content")
    .replace("</s> {% endfor %}{% if add", "</s>{% endgeneration %} {% endif %}{% endfor %}{% if add")
)  # fmt: skip


def calls(**arguments):
    function = {"name": "count", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


USER = {"role": "user", "content": "hello"}
TOOL = {"role": "tool", "content": "bye bye"}
ANSWER = {"role": "assistant", "content": "four"}


@pytest.mark.parametrize("template", [TOOLS, BLOCKS])
def test_calls_of_tools_count_and_what_tools_say_does_not(template):
    # The dialogues have other arguments, and Arrow gives each call the arguments of both
    rows = [
        {"messages": [USER, calls(a="two"), TOOL, ANSWER]},
        {"messages": [USER, calls(b="so", c="hi"), TOOL, ANSWER]},
    ]
    dataset = Dataset.from_list(rows)
    end = "</s>] <tool> bye bye </s> <assistant> [four </s>]"
    expected = [
        f"<user> hello </s> <assistant> [<call> two {end}",
        f"<user> hello </s> <assistant> [<call> so hi {end}",
    ]
    assert shown(prepare_dataset(dataset, make_tokenizer(template))) == expected
    assert shown(prepare_dataset(dataset.to_iterable_dataset(), make_tokenizer(template))) == expected


@pytest.mark.parametrize("template", [TOOLS, BLOCKS])
@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_are_read_and_do_not_count(template, role):
    template = template.replace(
        "<{{ m.role }}>", "{{ '<b>' if m.role in ('system', 'developer') else '<' + m.role + '>' }}"
    )
    dataset = Dataset.from_list([{"messages": [{"role": role, "content": "why"}, USER, ANSWER]}])
    assert shown(prepare_dataset(dataset, make_tokenizer(template))) == [
        "<b> why </s> <user> hello </s> <assistant> [four </s>]"
    ]


@pytest.mark.parametrize("role", ["robot", "Assistant", "gpt", ""])
@pytest.mark.parametrize("template", [TOOLS, BLOCKS])
def test_other_roles_are_refused(template, role):
    message = rf"roles system, developer, user, assistant or tool, got the role '{role}' in \[.*hello.*; rename it, or leave the"
    messages = [USER, {"role": role, "content": "two four"}]
    for row in ({"messages": [*messages, ANSWER]}, {"prompt": messages, "completion": [ANSWER]}):
        with pytest.raises(ValueError, match=message) as caught:
            prepare_dataset(Dataset.from_list([row]), make_tokenizer(template))
        assert "\n" not in str(caught.value)
