"""Mixtures of dialogues in several forms."""

import pytest
from datasets import Dataset

from fspad.trainer import dialogues as module
from fspad.trainer.dialogues import load_hub_dialogues, mix_dialogues
from helpers.dialogues import CHAT, make_tokenizer

IDS = Dataset.from_list([{"prompt_ids": [1, 2, row], "response_ids": [3, 4, 5]} for row in range(90)])
CHATS = Dataset.from_list([{"messages": CHAT, "source": "here"}] * 30)


def is_chat(row) -> bool:
    return row["input_ids"][:2] != [1, 2]


def test_all_rows_of_all_forms():
    mixed = mix_dialogues([IDS, CHATS], make_tokenizer(), 64)
    assert set(mixed.column_names) == {"input_ids", "assistant_mask", "length"}
    assert [is_chat(row) for row in mixed] == [False] * 90 + [True] * 30


@pytest.mark.parametrize("is_stream", [False, True])
def test_weights_are_shares_of_rows(is_stream):
    parts = [part.to_iterable_dataset() if is_stream else part for part in (IDS, CHATS)]
    first, second, other = (list(mix_dialogues(parts, make_tokenizer(), 64, [3, 1], seed)) for seed in (0, 0, 1))
    assert first == second != other
    # One part has no more rows, and none was taken twice
    assert len({tuple(row["input_ids"]) for row in first if not is_chat(row)}) == sum(
        not is_chat(row) for row in first
    )
    assert 0.15 < sum(map(is_chat, first)) / len(first) < 0.35


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, 0.0], [1.0, float("nan")]])
def test_weights_that_fit_no_datasets(weights):
    with pytest.raises(ValueError, match="expected a positive weight for each of the 2 datasets"):
        mix_dialogues([IDS, CHATS], make_tokenizer(), 64, weights)


def test_names_of_configurations(monkeypatch):
    asked = []

    def load(path, **kwargs):
        asked.append((path, kwargs))
        return IDS

    monkeypatch.setattr(module.datasets, "load_dataset", load)
    load_hub_dialogues("some/dialogues")
    load_hub_dialogues("some/dialogues:english", "test", streaming=True)
    assert asked == [
        ("some/dialogues", {"streaming": False, "split": "train"}),
        ("some/dialogues", {"streaming": True, "split": "test", "name": "english"}),
    ]
