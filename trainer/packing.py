"""Several dialogues in one row, so that little of a batch is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


def pack_dataset(dataset: Dataset, max_length: int) -> Dataset:
    """Pack the dialogues of a prepared dataset, a thousand at a time, always in the same way.

    Args:
        dataset: Rows with `input_ids` and `assistant_mask`, each of at most `max_length` tokens.
        max_length: Most tokens of a row.

    Returns:
        A dataset with the columns `input_ids`, `assistant_mask`, `position_ids` and `length`. Positions restart at 0
        with each dialogue, by which targets tell dialogues apart.
    """
    import datasets

    columns = {name: dataset.features[name] for name in ("input_ids", "assistant_mask", "length")}
    return dataset.map(
        _pack_rows,
        batched=True,
        input_columns=["input_ids", "assistant_mask"],
        remove_columns=dataset.column_names,
        features=datasets.Features({**columns, "position_ids": columns["input_ids"]}),
        fn_kwargs={"max_length": max_length},
        desc="Packing dialogues",
    )


def best_fit_decreasing(lengths: list[int], max_length: int) -> list[list[int]]:
    """Put the longest first, and each where the least room is left after it.

    Args:
        lengths: Lengths of at most `max_length`.
        max_length: Room of a bin.

    Returns:
        The indices of the lengths in each bin.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # sorted, of each bin the room that is left
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(rooms, (lengths[index], 0))
        if place == len(rooms):
            bins.append([])
            room, chosen = max_length, len(bins) - 1
        else:
            room, chosen = rooms.pop(place)
        bins[chosen].append(index)
        insort(rooms, (room - lengths[index], chosen))
    return bins


def _pack_rows(input_ids: list[list[int]], assistant_mask: list[list[int]], max_length: int) -> dict[str, list]:
    packed: dict[str, list] = {"input_ids": [], "assistant_mask": [], "position_ids": [], "length": []}
    for dialogues in best_fit_decreasing([len(ids) for ids in input_ids], max_length):
        ids = [token for dialogue in dialogues for token in input_ids[dialogue]]
        packed["input_ids"].append(ids)
        # Nothing before a dialogue predicts its first token, so that no counted row reaches over a border.
        packed["assistant_mask"].append(
            [value for dialogue in dialogues for value in [0, *assistant_mask[dialogue][1:]]]
        )
        packed["position_ids"].append([i for dialogue in dialogues for i in range(len(input_ids[dialogue]))])
        packed["length"].append(len(ids))
    return packed
