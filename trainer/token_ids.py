"""Checks of token ids that somebody else has made."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from datasets import Dataset


def to_integers(values: Sequence[int] | None) -> list[int]:
    """Turn a row's token ids, mask or positions into Python's integers.

    Args:
        values: A sequence or tensor of integers; `None` for none.

    Returns:
        The integers.

    Raises:
        ValueError: If they are no integers.
    """
    if values is None:
        return []
    try:
        integers = [int(value) for value in values]
    except (TypeError, ValueError):
        integers = None
    if integers is None or integers != list(values):
        raise ValueError(
            f"expected a list of integers as token ids, mask or positions, got {shorten(repr(values), 200)}; tokenize the "
            "texts, or name the columns of texts `messages`, or `prompt` and `completion`."
        )
    return integers


def check_token_ids(ids: torch.Tensor, vocab_size: int) -> None:
    """Check that token ids can be the target's.

    Args:
        ids: Token ids of any shape.
        vocab_size: Vocabulary size of the target.

    Raises:
        ValueError: If one is negative or not below `vocab_size`.
    """
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.numel():
        raise ValueError(
            f"expected token ids below {vocab_size}, the target's vocabulary size, got {int(wrong[0])}; tokenize the "
            "dataset with this target's tokenizer."
        )


def check_dataset(dataset: Dataset, vocab_size: int) -> None:
    """Check the token ids of a whole dataset, before hours of training come to the one that is wrong.

    Args:
        dataset: Rows with `input_ids`.
        vocab_size: Vocabulary size of the target.

    Raises:
        ValueError: If one is negative or not below `vocab_size`.
    """
    import pyarrow.compute

    for table in dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000):
        extremes = pyarrow.compute.min_max(table["input_ids"].combine_chunks().flatten()).as_py()
        check_token_ids(torch.tensor([extremes["min"] or 0, extremes["max"] or 0]), vocab_size)
