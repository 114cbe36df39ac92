"""From dialogues to batches."""

import logging

import pytest
import torch
from datasets import Dataset, IterableDataset, load_from_disk

from fspad.trainer import DataCollatorForFSPAD
from fspad.trainer.data import count_token_frequencies, most_frequent_tokens, prepare_dataset
from helpers.dialogues import (
    CHAT,
    CHAT_IDS,
    CHAT_MASK,
    GENERATION,
    MARKERS,
    WORDS,
    features_dataset,
    make_tokenizer,
    prepare_one,
)


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


def test_rows_without_an_answer_are_dropped(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    rows = [
        {"prompt_ids": [5] * 4, "response_ids": [7] * 9},
        {"prompt_ids": [5] * 3, "response_ids": [7]},
        {"prompt_ids": [], "response_ids": [7, 7]},
        {"prompt_ids": [5], "response_ids": None},
    ]
    prepared = prepare_dataset(Dataset.from_list(rows), None, max_length=8)
    assert prepared.to_list() == [{"input_ids": [5] * 4 + [7] * 4, "assistant_mask": [0] * 4 + [1] * 4, "length": 8}]
    assert "Dropped 3 of 4 rows" in caplog.text


@pytest.mark.parametrize("rows", [1, 1200])
def test_empty_dialogues_are_dropped(rows):
    # More of them than are written at once, whose type would otherwise be told from them alone
    messages = prepare_dataset(Dataset.from_list([{"messages": []}] * rows + [{"messages": CHAT}]), make_tokenizer())
    assert messages["input_ids"][:] == [CHAT_IDS]
    ids = [{"input_ids": None, "assistant_mask": []}] * rows + [{"input_ids": [5, 7, 8], "assistant_mask": [0, 1, 1]}]
    assert prepare_dataset(Dataset.from_list(ids), None)["input_ids"][:] == [[5, 7, 8]]


# Prompts of 6 to 15 tokens and answers of 8, with a token of the assistant that is no answer before one of them
@pytest.mark.parametrize(
    ("mask", "expected_start"),
    [
        ([0] * 6 + [1] * 8, 0),
        ([0] * 7 + [1] * 8, 3),
        ([0] * 15 + [1] * 8, 11),
        ([0] * 15 + [1] * 2, 9),
        ([0, 1] + [0] * 13 + [1] * 8, 11),
    ],
)
def test_truncation_keeps_the_start_of_the_answer(mask, expected_start):
    ids = list(range(len(mask)))
    row = prepare_one({"input_ids": ids, "assistant_mask": mask}, max_length=8)
    window = slice(expected_start, expected_start + 8)
    assert row == {"input_ids": ids[window], "assistant_mask": mask[window], "length": 8}


@pytest.mark.parametrize("max_length", [3, 4, 5])
def test_shortest_windows(max_length):
    row = prepare_one(
        {"input_ids": list(range(12)), "assistant_mask": [0] * 7 + [1, 1] + [0] * 3}, max_length=max_length
    )
    assert row["length"] == max_length
    # One token before the answer, and its first two
    assert {6, 7, 8} <= set(row["input_ids"])


def test_truncation_to_an_answer_alone():
    row = {"input_ids": [5, 6, 7, 8, 9], "assistant_mask": [1, 1, 1, 1, 0]}
    prepared = prepare_dataset(Dataset.from_list([row]), None, max_length=3)
    assert prepared[0] == {"input_ids": [5, 6, 7], "assistant_mask": [0, 1, 1], "length": 3}
    assert prepare_dataset(prepared, None, max_length=3) is prepared


def test_rows_with_features_are_cut_at_the_end():
    prepared = prepare_dataset(features_dataset(), None, max_length=5)
    assert prepared["input_ids"][:] == [[0, 1, 2, 3, 4], [0, 1, 2, 3]]
    batch = DataCollatorForFSPAD()(list(prepared))
    assert batch["features"][..., 0].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0]]


def test_features_are_never_read():
    dataset = features_dataset()

    def transform(batch):
        if "features" in batch:
            raise MemoryError("the features are large")
        return batch

    prepared = prepare_dataset(dataset.with_transform(transform), None, max_length=5)
    assert len(prepared) == 2
    # Neither have they been copied
    buffers = [rows.data["features"].chunk(0).buffers()[-1].address for rows in (dataset, prepared)]
    assert buffers[0] == buffers[1]
    assert prepare_dataset(prepared, None, max_length=5) is prepared
    with pytest.raises(MemoryError):
        prepared[0]


@pytest.mark.parametrize("packing", [False, True])
def test_prepared_datasets_pass_through(packing):
    dataset = Dataset.from_list([{"prompt_ids": [5, 6], "response_ids": [7, 8]}] * 3)
    prepared = prepare_dataset(dataset, None, max_length=8, packing=packing)
    assert prepare_dataset(prepared, None, max_length=8, packing=packing) is prepared
    assert prepare_dataset(prepared, None) is prepared


@pytest.mark.parametrize("packing", [False, True])
def test_prepared_datasets_are_cached(tmp_path, packing):
    Dataset.from_list([{"messages": CHAT}] * 3 + [{"messages": []}]).save_to_disk(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 12

    def prepare(**kwargs):
        arguments = {"max_length": 40, "packing": packing, **kwargs}
        return prepare_dataset(load_from_disk(tmp_path), tokenizer, **arguments), set(tmp_path.iterdir())

    first, files = prepare()
    # All that a tokenizer keeps of its use: a warning of long texts, padding and truncation
    tokenizer("hello " * 50)
    tokenizer(["hello you", "hi"], padding=True, truncation=True, max_length=2)
    second, files_after = prepare()
    assert second._fingerprint == first._fingerprint
    assert files_after == files
    assert second.to_list() == first.to_list()
    third, files_after = prepare(max_length=20)
    assert third._fingerprint != first._fingerprint
    assert files_after > files
    tokenizer.chat_template = GENERATION.replace("end ", "")
    assert len(prepare()[0][0]["input_ids"]) < len(first[0]["input_ids"])


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


@pytest.mark.parametrize("row", [["a"], "abc", 5, [1.5], [[1]], [None]])
def test_token_ids_that_are_no_integers(row):
    with pytest.raises(ValueError, match=r"expected a list of integers .*, got .*; tokenize the texts"):
        prepare_one({"prompt_ids": row, "response_ids": [7, 8]})


@pytest.mark.parametrize("position_ids", [False, True])
def test_wrong_masks_of_prepared_datasets(position_ids):
    good = {"input_ids": [5, 6, 7], "assistant_mask": [0, 1, 1], "length": 3}
    good |= {"position_ids": [0, 1, 2]} if position_ids else {}
    for change, message in (
        ({"assistant_mask": [1, 1, 1]}, "ones for all 3 tokens"),
        ({"assistant_mask": [0, 1]}, "3 input_ids and 2 values"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_dataset(Dataset.from_list([good, good | change]), None)
    with pytest.raises(ValueError, match="got none in 2 rows"):
        prepare_dataset(Dataset.from_list([good | {"assistant_mask": [0, 0, 1]}] * 2), None)


def test_datasets_without_rows():
    with pytest.raises(ValueError, match="one without rows; check the path"):
        prepare_dataset(Dataset.from_list([]), None)
    with pytest.raises(ValueError, match="one without rows; check the path"):
        prepare_dataset(Dataset.from_dict({"input_ids": [], "assistant_mask": [], "length": []}), None, max_length=4)
    with pytest.raises(ValueError, match="one without rows; check the path"):
        prepare_dataset(IterableDataset.from_generator(lambda: iter(())), None)


def test_streamed_datasets():
    read = []

    def rows(read=read):
        for number in range(100):
            read.append(number)
            yield {"messages": [] if number % 2 else CHAT, "source": number}

    stream = IterableDataset.from_generator(rows)
    assert stream.column_names is None
    prepared = prepare_dataset(stream, make_tokenizer(), max_length=16)
    assert len(read) <= 2
    expected = {"input_ids": CHAT_IDS[:16], "assistant_mask": CHAT_MASK[:16], "length": 16}
    assert list(prepared) == [expected] * 50
    assert list(prepare_dataset(prepared, None, max_length=16)) == [expected] * 50
    read.clear()
    counts = count_token_frequencies(prepared, vocab_size=len(WORDS), max_rows=3)
    assert len(read) <= 6
    assert counts.tolist() == [0, 3, 0, 0, 0, 0, 0, 3, 3, 3, 0, 0]


def test_stream_with_known_columns_and_of_packed_rows():
    dataset = Dataset.from_list([{"prompt_ids": [5, 6], "response_ids": [7, 8]}] * 3)
    assert list(prepare_dataset(dataset.to_iterable_dataset(), None)) == list(prepare_dataset(dataset, None))
    packed = prepare_dataset(dataset, None, max_length=8, packing=True)
    assert list(prepare_dataset(packed.to_iterable_dataset(), None, max_length=8, packing=True)) == list(packed)


def test_stream_that_never_has_an_answer():
    def rows():
        while True:
            yield {"input_ids": [5, 6, 7], "assistant_mask": [0, 0, 0]}

    with pytest.raises(ValueError, match="got none in 1000 rows"):
        prepare_dataset(IterableDataset.from_generator(rows), None)


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


def test_collator_knows_the_vocabulary():
    rows = [{"input_ids": [5, 6, 7], "assistant_mask": [0, 1, 1]}, {"input_ids": [8, 9], "assistant_mask": [0, 1]}]
    assert DataCollatorForFSPAD(vocab_size=10)(rows)["input_ids"].shape == (2, 3)
    with pytest.raises(
        ValueError, match=r"token ids below 9, .* got 9; tokenize the dataset with this target's tokenizer"
    ):
        DataCollatorForFSPAD(vocab_size=9)(rows)
    with pytest.raises(ValueError, match="got -1;"):
        DataCollatorForFSPAD(vocab_size=9)([{"input_ids": [5, -1], "assistant_mask": [0, 1]}])


def test_draft_vocabulary():
    rows = [{"prompt_ids": [5, 5, 5], "response_ids": [7, 8, 8]}, {"prompt_ids": [5], "response_ids": [9, 8, 7]}]
    counts = count_token_frequencies(prepare_dataset(Dataset.from_list(rows), None), vocab_size=12)
    assert counts.tolist() == [0, 0, 0, 0, 0, 0, 0, 2, 3, 1, 0, 0]
    assert most_frequent_tokens(counts, 5, special_ids=[1, 0, 1]).tolist() == [0, 1, 8, 7, 9]
    with pytest.raises(ValueError, match=r"of 2 .* to 12 tokens .* got 13"):
        most_frequent_tokens(counts, 13, special_ids=[0, 1])
    with pytest.raises(ValueError, match="token ids below 8, the target's vocabulary size, got 8"):
        count_token_frequencies(prepare_dataset(Dataset.from_list(rows), None), vocab_size=8)
    with pytest.raises(ValueError, match="got 1;"):
        most_frequent_tokens(counts, 1, special_ids=[0, 1])
