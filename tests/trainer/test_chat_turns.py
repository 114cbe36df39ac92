"""Chat templates that change turns of the assistant when others follow: a row for each turn."""

import logging

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fspad.trainer.chat import mark_messages
from fspad.trainer.data import prepare_dataset

SPECIAL = ["<?>", "</s>", "<user>", "<assistant>", "<tool>", "<think>", "</think>", "<call>", "<b>"]
WORDS = [*SPECIAL, "hello", "hi", "bye", "now", "why", "so", "two", "four"]
# Thoughts of turns before the user's last message are left out, and a turn after it gets a block of none if it has none
HEADER = (
    "{% set asked = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set asked.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<{{ m.role }}> {% if m.role != 'assistant' %}{{ m.content }} </s>{% else %}"
    "{% set thoughts, mark, answer = m.content.rpartition('</think>') %}"
    "{% set thoughts = thoughts.replace('<think>', '').strip() %}"
)
FOOTER = "{% endif %} {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
SHOWN = "{% if loop.index0 > asked.last %}<think> {{ thoughts }} </think> {% endif %}{{ answer.strip() }} </s>"
THINKING = HEADER + SHOWN + FOOTER
BLOCKS = HEADER + "{% generation %}" + SHOWN + "{% endgeneration %}" + FOOTER
CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "<think> why so </think> hi"},
    {"role": "user", "content": "now"},
    {"role": "assistant", "content": "<think> two </think> four bye"},
]
FIRST = "<user> hello </s> <assistant> [<think> why so </think> hi </s>]"
SECOND = "<user> hello </s> <assistant> hi </s> <user> now </s> <assistant> [<think> two </think> four bye </s>]"


def make_tokenizer(template):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<?>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", chat_template=template)


def shown(rows):
    """The words of rows, with brackets around what is masked."""
    texts = []
    for row in rows:
        assert row["length"] == len(row["input_ids"])
        words, before = [], 0
        for token, value in zip(row["input_ids"], row["assistant_mask"], strict=True):
            if before and not value:
                words[-1] += "]"
            words.append("[" * (value > before) + WORDS[token])
            before = value
        texts.append(" ".join(words) + "]" * before)
    return texts


def prepare(row, template, **kwargs):
    return prepare_dataset(Dataset.from_list([row]), make_tokenizer(template), **kwargs)


@pytest.mark.parametrize("template", [THINKING, BLOCKS])
def test_one_row_for_each_turn_as_the_template_shows_it(template, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert shown(prepare({"messages": CHAT}, template)) == [FIRST, SECOND]
    assert "Made 2 rows of 1 dialogues: the chat template changes turns" in caplog.text


@pytest.mark.parametrize("template", [THINKING, BLOCKS])
def test_several_dialogues_keep_their_order(template):
    rows = [{"messages": messages} for messages in (CHAT[:2], CHAT, [], CHAT[2:])]
    last = "<user> now </s> <assistant> [<think> two </think> four bye </s>]"
    expected = [FIRST, FIRST, SECOND, last]
    assert shown(prepare_dataset(Dataset.from_list(rows), make_tokenizer(template))) == expected
    stream = Dataset.from_list(rows * 30).to_iterable_dataset()
    assert shown(prepare_dataset(stream, make_tokenizer(template))) == expected * 30


@pytest.mark.parametrize("template", [THINKING, BLOCKS])
def test_each_row_is_cut_and_packed_by_itself(template):
    # The answer of the second row begins after ten tokens
    cut = "<user> now </s> <assistant> [<think> two </think> four]"
    assert shown(prepare({"messages": CHAT}, template, max_length=8)) == [FIRST.replace(" hi </s>]", "]"), cut]
    (packed,) = prepare({"messages": CHAT}, template, max_length=40, packing=True)
    assert packed["position_ids"] == [*range(16), *range(10)]


@pytest.mark.parametrize("template", [THINKING, BLOCKS])
def test_turns_that_nothing_follows_stay_in_one_row(template):
    # Thoughts are kept as long as no user writes
    messages = [
        *CHAT[:1],
        {"role": "assistant", "content": "<think> why </think> <call>"},
        {"role": "tool", "content": "two"},
        {"role": "assistant", "content": "four"},
    ]
    assert shown(prepare({"messages": messages}, template)) == [
        "<user> hello </s> <assistant> [<think> why </think> <call> </s>] <tool> two </s> "
        "<assistant> [<think> </think> four </s>]"
    ]


@pytest.mark.parametrize("template", [THINKING, BLOCKS])
def test_last_message_of_the_user_is_left_out(template):
    assert shown(prepare({"messages": CHAT[:3]}, template)) == [FIRST]


@pytest.mark.parametrize("template", [THINKING, BLOCKS])
@pytest.mark.parametrize(("border", "expected"), [(1, [FIRST, SECOND]), (2, [SECOND]), (3, [SECOND])])
def test_prompts_and_completions(template, border, expected):
    assert shown(prepare({"prompt": CHAT[:border], "completion": CHAT[border:]}, template)) == expected


@pytest.mark.parametrize("template", [THINKING, BLOCKS])
def test_a_turn_without_a_prompt_has_no_row(template):
    expected = "<assistant> hi </s> <user> now </s> <assistant> [<think> two </think> four bye </s>]"
    assert shown(prepare({"messages": CHAT[1:]}, template)) == [expected]
    with pytest.raises(ValueError, match="got none in 1 rows"):
        prepare({"messages": CHAT[1:3]}, template)


@pytest.mark.parametrize("template", [THINKING, BLOCKS])
def test_rows_with_features_are_not_taken_apart(template):
    with pytest.raises(ValueError, match="leaves earlier turns as they are, since a row with `features`"):
        prepare({"messages": CHAT, "features": [[0.5]] * 25}, template)
    assert shown(prepare({"messages": CHAT[:2], "features": [[0.5]] * 10}, template)) == [FIRST]


# A block of no thoughts where a turn is asked for, and no thoughts in a turn that is given
NO_THOUGHTS = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> <think> </think> {% endif %}"
)


def test_prompts_that_ask_with_more_than_a_turn_keeps():
    first = "<user> hello </s> <assistant> <think> </think> [hi </s>]"
    second = "<user> hello </s> <assistant> hi </s> <user> now </s> <assistant> <think> </think> [bye </s>]"
    messages = [CHAT[0], {"role": "assistant", "content": "hi"}, CHAT[2], {"role": "assistant", "content": "bye"}]
    assert shown(prepare({"messages": messages}, NO_THOUGHTS)) == [first, second]
    assert shown(prepare({"messages": messages[:2]}, NO_THOUGHTS)) == [first]
    # An answer that begins as the block does is whole all the same
    messages = [CHAT[0], {"role": "assistant", "content": "<think> so"}]
    first = "<user> hello </s> <assistant> <think> </think> [<think> so </s>]"
    assert shown(prepare({"messages": messages}, NO_THOUGHTS)) == [first]


def test_templates_that_end_a_dialogue():
    template = NO_THOUGHTS.replace("<think> </think> {% endif %}", "{% else %}bye{% endif %}")
    messages = [CHAT[0], {"role": "assistant", "content": "hi"}, CHAT[2], {"role": "assistant", "content": "so"}]
    assert shown(prepare({"messages": messages}, template)) == [
        "<user> hello </s> <assistant> [hi </s>] bye",
        "<user> hello </s> <assistant> hi </s> <user> now </s> <assistant> [so </s>] bye",
    ]


def test_turns_of_several_blocks():
    template = BLOCKS.replace("{{ answer", "{% endgeneration %}{% generation %}{{ answer")
    chats = mark_messages(CHAT, make_tokenizer(template))
    marked = [[chat.text[span.start : span.end] for span in chat.spans] for chat in chats]
    assert marked == [["<think> why so </think> ", "hi </s>"], ["<think> two </think> ", "four bye </s>"]]
