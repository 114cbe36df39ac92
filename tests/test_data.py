"""From dialogues to batches."""

import logging

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fspad.trainer import DataCollatorForFSPAD
from fspad.trainer.data import count_token_frequencies, most_frequent_tokens, prepare_dataset

WORDS = [
    "<pad>",
    "</s>",
    "<user>",
    "<assistant>",
    "end",
    "hello",
    "you",
    "hi",
    "bye",
    "now",
    "<system>",
    "FSPAD-USER-TURN",
]
MARKERS = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> end {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
GENERATION = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s>"
    "{% endgeneration %}{% else %}{{ m.content }} </s>{% endif %} end {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
CHAT = [
    {"role": "user", "content": "hello you"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "bye now"},
]
# <user> hello you </s> end <assistant> hi </s> end <user> bye </s> end <assistant> bye now </s> end
CHAT_IDS = [2, 5, 6, 1, 4, 3, 7, 1, 4, 2, 8, 1, 4, 3, 8, 9, 1, 4]
CHAT_MASK = [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0]


def make_tokenizer(chat_template=MARKERS):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        extra_special_tokens=["<user>", "<assistant>"],
        chat_template=chat_template,
    )


def prepare_one(row, **kwargs):
    prepared = prepare_dataset(Dataset.from_list([row]), kwargs.pop("tokenizer", None), **kwargs)
    return prepared[0]


@pytest.mark.parametrize("template", [MARKERS, GENERATION])
def test_messages(template):
    row = prepare_one({"messages": CHAT}, tokenizer=make_tokenizer(template))
    assert row == {"input_ids": CHAT_IDS, "assistant_mask": CHAT_MASK, "length": 18}


def test_messages_that_end_with_the_user():
    row = prepare_one({"messages": CHAT[:3]}, tokenizer=make_tokenizer())
    assert row["assistant_mask"] == CHAT_MASK[:13]


def test_template_that_forgets_earlier_turns():
    template = "{% for m in messages[-2:] %}<{{ m.role }}> {{ m.content }} </s> end {% endfor %}"
    with pytest.raises(ValueError, match=r"put a .* block into the template"):
        prepare_one({"messages": CHAT}, tokenizer=make_tokenizer(template))


def test_token_ids():
    expected = {"input_ids": [5, 6, 7, 8], "assistant_mask": [0, 0, 1, 1], "length": 4}
    assert prepare_one({"prompt_ids": [5, 6], "response_ids": [7, 8]}) == expected
    assert prepare_one({"input_ids": [5, 6, 7, 8], "assistant_mask": [0, 0, 1, 1]}) == expected
    # Token ids are what the target wrote: they win over a text that may be tokenized differently.
    assert prepare_one({"messages": CHAT, "prompt_ids": [5, 6], "response_ids": [7, 8]}) == expected


def test_truncation_drops_rows_without_an_answer(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    rows = [
        {"prompt_ids": [5] * 4, "response_ids": [7] * 9},
        {"prompt_ids": [5] * 8, "response_ids": [7] * 9},
        {"prompt_ids": [5] * 3, "response_ids": [7]},
    ]
    prepared = prepare_dataset(Dataset.from_list(rows), None, max_length=8)
    assert prepared.to_list() == [{"input_ids": [5] * 4 + [7] * 4, "assistant_mask": [0] * 4 + [1] * 4, "length": 8}]
    assert "Dropped 2 of 3 rows" in caplog.text


def test_prepared_datasets_pass_through():
    prepared = prepare_dataset(Dataset.from_list([{"prompt_ids": [5, 6], "response_ids": [7, 8]}]), None)
    assert prepare_dataset(prepared, None) is prepared


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="ones for all 2 tokens"):
        prepare_one({"input_ids": [5, 6], "assistant_mask": [1, 1]})
    with pytest.raises(ValueError, match="got none in 1 rows"):
        prepare_one({"input_ids": [5, 6, 7], "assistant_mask": [0, 0, 0]})
    with pytest.raises(ValueError, match=r"`messages`, or `prompt_ids` \+ `response_ids`.*\['text'\]"):
        prepare_one({"text": "hello"})
    with pytest.raises(ValueError, match="tokenizer as `processing_class`"):
        prepare_one({"messages": CHAT})
    with pytest.raises(ValueError, match="3 input_ids and 2 values"):
        prepare_one({"input_ids": [5, 6, 7], "assistant_mask": [0, 1]})


def test_streamed_datasets():
    stream = Dataset.from_list([{"prompt_ids": [5, 6], "response_ids": [7, 8]}] * 2).to_iterable_dataset()
    assert len(list(prepare_dataset(stream, None))) == 2


def test_collator_pads_on_the_right():
    rows = [
        {"input_ids": [5, 6, 7], "assistant_mask": [0, 1, 1], "length": 3},
        {"input_ids": [8, 9], "assistant_mask": [0, 1], "length": 2},
    ]
    batch = DataCollatorForFSPAD(pad_token_id=4)(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 4]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "assistant_mask": [[0, 1, 1], [0, 1, 0]],
    }


def test_collator_passes_features_through():
    rows = [
        {"input_ids": [5, 6, 7], "assistant_mask": [0, 1, 1], "features": torch.ones(4, 2, dtype=torch.bfloat16)},
        {"input_ids": [8, 9], "assistant_mask": [0, 1], "features": torch.ones(2, 2, dtype=torch.bfloat16)},
    ]
    features = DataCollatorForFSPAD()(rows)["features"]
    assert features.dtype == torch.bfloat16
    assert features[..., 0].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_draft_vocabulary():
    rows = [{"prompt_ids": [5, 5, 5], "response_ids": [7, 8, 8]}, {"prompt_ids": [5], "response_ids": [9, 8, 7]}]
    counts = count_token_frequencies(prepare_dataset(Dataset.from_list(rows), None), vocab_size=12)
    assert counts.tolist() == [0, 0, 0, 0, 0, 0, 0, 2, 3, 1, 0, 0]
    assert most_frequent_tokens(counts, 5, special_ids=[1, 0, 1]).tolist() == [0, 1, 8, 7, 9]
    with pytest.raises(ValueError, match=r"of 2 .* to 12 tokens .* got 13"):
        most_frequent_tokens(counts, 13, special_ids=[0, 1])
    with pytest.raises(ValueError, match="got 1;"):
        most_frequent_tokens(counts, 1, special_ids=[0, 1])
