"""Several dialogues in a row: which, what counts, and that a target tells them apart."""

import pytest
import torch
from datasets import Dataset

from fspad.target import FeatureTap
from fspad.trainer import DataCollatorForFSPAD
from fspad.trainer.data import prepare_dataset
from helpers.dialogues import features_dataset, prepare_one
from helpers.models import make_target


def packing_dataset():
    rows = [(2, 3), (1, 2), (3, 4), (2, 5), (1, 3)]  # 5, 3, 7, 7 and 4 tokens
    return Dataset.from_list(
        [
            {"prompt_ids": [10 * n + 1] * prompt, "response_ids": [10 * n + 2] * answer}
            for n, (prompt, answer) in enumerate(rows)
        ]
    )


def test_packing():
    packed = prepare_dataset(packing_dataset(), None, max_length=12, packing=True)
    assert packed.to_list() == [
        {
            "input_ids": [21] * 3 + [22] * 4 + [1] * 2 + [2] * 3,
            "assistant_mask": [0] * 3 + [1] * 4 + [0] * 2 + [1] * 3,
            "position_ids": [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4],
            "length": 12,
        },
        {
            "input_ids": [31] * 2 + [32] * 5 + [41] + [42] * 3,
            "assistant_mask": [0] * 2 + [1] * 5 + [0] + [1] * 3,
            "position_ids": [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3],
            "length": 11,
        },
        {"input_ids": [11, 12, 12], "assistant_mask": [0, 1, 1], "position_ids": [0, 1, 2], "length": 3},
    ]


def test_no_counted_row_crosses_the_border_of_dialogues():
    row = {"input_ids": [5, 6, 7, 8], "assistant_mask": [1, 0, 1, 1], "length": 4}
    (packed,) = prepare_dataset(Dataset.from_list([row] * 2), None, max_length=8, packing=True)
    assert packed["assistant_mask"] == [0, 0, 1, 1, 0, 0, 1, 1]
    # Rows that somebody else has packed
    row = {"input_ids": [5, 6, 7, 8], "assistant_mask": [0, 1, 1, 1], "position_ids": [0, 1, 0, 1]}
    with pytest.raises(ValueError, match="got none in 1 rows"):
        prepare_one(row)


def test_errors_of_packing():
    dataset = packing_dataset()
    with pytest.raises(ValueError, match="expected `max_length` with `packing=True`, got None"):
        prepare_dataset(dataset, None, packing=True)
    with pytest.raises(ValueError, match="got a stream; load it without"):
        prepare_dataset(dataset.to_iterable_dataset(), None, max_length=12, packing=True)
    with pytest.raises(ValueError, match="rows without `features`"):
        prepare_dataset(features_dataset(), None, max_length=12, packing=True)
    packed = prepare_dataset(dataset, None, max_length=12, packing=True)
    with pytest.raises(ValueError, match="packed rows of at most max_length=8 tokens, got one of 12; pack"):
        prepare_dataset(packed, None, max_length=8, packing=True)
    with pytest.raises(ValueError, match="3 input_ids and 2 position_ids"):
        prepare_one({"input_ids": [5, 6, 7], "assistant_mask": [0, 1, 1], "position_ids": [0, 1]})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_targets_tell_packed_dialogues_apart(family, attention):
    target = make_target(family)
    target.set_attn_implementation(attention)

    def features(**inputs):
        with torch.no_grad(), FeatureTap(target) as tap, tap.record() as recorded:
            target(**inputs, use_cache=False)
        return recorded[0]

    # Longer than the sliding window, so that its position in the row would matter
    dialogues = [torch.randint(97, (length,)).tolist() for length in (20, 15, 5, 17, 3)]
    rows = [{"prompt_ids": ids[:1], "response_ids": ids[1:]} for ids in dialogues]
    packed = prepare_dataset(Dataset.from_list(rows), None, max_length=40, packing=True)
    batch = DataCollatorForFSPAD(pad_token_id=96)(list(packed))
    assert batch["position_ids"].shape == (2, 40)
    assert batch["position_ids"][1, 20:].tolist() == [0] * 20
    assert batch["attention_mask"].sum(dim=1).tolist() == [40, 20]
    got = features(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    seen = []
    for ids, positions, row in zip(batch["input_ids"], batch["position_ids"], got, strict=True):
        starts = (positions == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            expected = features(input_ids=ids[None, start:end])[0]
            torch.testing.assert_close(row[start:end], expected, rtol=1e-5, atol=1e-5)
            seen.append(ids[start:end].tolist())
    assert all(dialogue in seen for dialogue in dialogues)
