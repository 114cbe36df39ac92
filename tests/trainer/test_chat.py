"""Chats, prompts and completions to token ids, and which of them count."""

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fspad.trainer.data import prepare_dataset
from helpers.dialogues import CHAT, CHAT_IDS, CHAT_MASK, GENERATION, MARKERS, make_tokenizer, prepare_one

TEXT = {"prompt": "<user> hello you", "completion": "hi bye"}


def make_byte_pairs():
    """Two letters that become one token when they stand together."""
    letters = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "</s>": 3}, merges=[("a", "b")]))
    return PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>")


@pytest.mark.parametrize("template", [MARKERS, GENERATION])
@pytest.mark.parametrize("border", [1, 2, 3])
def test_prompts_and_completions_of_messages(template, border):
    row = prepare_one({"prompt": CHAT[:border], "completion": CHAT[border:]}, tokenizer=make_tokenizer(template))
    mask = CHAT_MASK if border == 1 else [0] * 14 + CHAT_MASK[14:]
    assert row == {"input_ids": CHAT_IDS, "assistant_mask": mask, "length": 18}


def test_generation_block_of_a_template_that_ends_dialogues():
    template = GENERATION.removesuffix("{% endif %}") + "{% else %}bye{% endif %}"
    tokenizer = make_tokenizer(template)
    row = prepare_one({"prompt": CHAT[:3], "completion": CHAT[3:]}, tokenizer=tokenizer)
    assert row["input_ids"] == [*CHAT_IDS, 8]
    assert row["assistant_mask"] == [0] * 14 + CHAT_MASK[14:] + [0]


def test_prompts_and_completions_of_text():
    expected = {"input_ids": [2, 5, 6, 7, 8, 1], "assistant_mask": [0, 0, 0, 1, 1, 1], "length": 6}
    tokenizer = make_tokenizer()
    assert prepare_one({**TEXT, "completion": " hi bye </s>"}, tokenizer=tokenizer)["input_ids"] == [2, 5, 6, 7, 8, 1]
    assert prepare_one({**TEXT, "completion": " hi bye "}, tokenizer=tokenizer) == expected
    tokenizer.eos_token = None
    assert prepare_one({**TEXT, "completion": " hi bye"}, tokenizer=tokenizer)["input_ids"] == [2, 5, 6, 7, 8]


def test_no_token_crosses_the_border_of_prompt_and_completion():
    tokenizer = make_byte_pairs()
    row = prepare_one({"prompt": "aba", "completion": "bb"}, tokenizer=tokenizer)
    assert row == {"input_ids": [2, 0, 1, 1, 3], "assistant_mask": [0, 0, 1, 1, 1], "length": 5}
    row = prepare_one({"prompt": "ab", "completion": "ab"}, tokenizer=tokenizer)
    assert row == {"input_ids": [2, 2, 3], "assistant_mask": [0, 1, 1], "length": 3}


def test_empty_prompts_and_completions_are_dropped():
    rows = [{"prompt": p, "completion": c} for p, c in (("", "ab"), ("a", ""), (None, "a"), ("a", None), ("a", "b"))]
    assert prepare_dataset(Dataset.from_list(rows), make_byte_pairs())["input_ids"][:] == [[0, 1, 3]]


def test_token_ids_win_over_text():
    ids = {"prompt_ids": [5, 6], "response_ids": [7, 8]}
    assert prepare_one({**TEXT, **ids}, tokenizer=make_tokenizer())["input_ids"] == [5, 6, 7, 8]


def test_dialogue_that_the_assistant_opens():
    row = prepare_one({"messages": CHAT[1:]}, tokenizer=make_tokenizer())
    # <assistant> hi </s> end <user> bye </s> end <assistant> bye now </s> end
    assert row["input_ids"] == CHAT_IDS[5:]
    assert row["assistant_mask"] == [0] * 9 + [1, 1, 1, 0]


def test_calls_of_tools_have_no_content():
    template = MARKERS.replace("m.content", "m.content or 'now'")
    messages = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}]
    row = prepare_one({"messages": messages}, tokenizer=make_tokenizer(template))
    assert row["assistant_mask"] == [0] * 6 + [1, 1, 0]


@pytest.mark.parametrize(
    "messages",
    [
        [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}],
        [{"role": "user", "content": "hello"}, {"role": "assistant", "content": None}],
        [{"role": None, "content": "hello"}],
        ["hello", "hi"],
        "hello",
    ],
)
@pytest.mark.parametrize("template", [MARKERS, GENERATION])
def test_malformed_messages(messages, template):
    with pytest.raises(ValueError, match=r"messages with `role` and `content`, got .*hello.*; give each"):
        prepare_dataset(Dataset.from_list([{"messages": messages}]), make_tokenizer(template))


def test_prompt_of_messages_and_completion_of_text():
    with pytest.raises(ValueError, match=r"two texts or two lists of messages, got .*hello you.* and 'hi'; turn"):
        prepare_one({"prompt": CHAT[:1], "completion": "hi"}, tokenizer=make_tokenizer())


def test_columns_that_are_neither_texts_nor_messages():
    with pytest.raises(ValueError, match="two texts or two lists of messages, got 5 and 6; turn"):
        prepare_one({"prompt": 5, "completion": 6}, tokenizer=make_tokenizer())
    with pytest.raises(ValueError, match="expected a list of messages, got 5; give each"):
        prepare_one({"messages": 5}, tokenizer=make_tokenizer())


def test_tokenizer_without_a_template():
    tokenizer = make_tokenizer(None)
    for row in ({"messages": CHAT}, {"prompt": CHAT[:1], "completion": CHAT[1:]}):
        with pytest.raises(ValueError, match=r"set `tokenizer.chat_template`, or pass `prompt` and `completion`"):
            prepare_one(row, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="for a dataset with `prompt` and `completion`, got None"):
        prepare_one(TEXT)


def test_templates_that_refuse_messages():
    tokenizer = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"can render, got \[.*hello you.*says: roles must alternate; leave"):
        prepare_one({"messages": CHAT}, tokenizer=tokenizer)


def test_generation_blocks_that_forget_earlier_turns():
    tokenizer = make_tokenizer(GENERATION.replace("in messages", "in messages[-2:]"))
    row = prepare_one({"prompt": CHAT[:3], "completion": CHAT[3:]}, tokenizer=tokenizer)
    assert row == {"input_ids": CHAT_IDS[9:], "assistant_mask": CHAT_MASK[9:], "length": 9}
