"""From rows of dialogues to padded batches: which tokens there are, and which of them the assistant wrote."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from .marked_text import first_counted_row
from .packing import pack_dataset
from .rows import FORMS, NEED_TOKENIZER, PACKED, check_mask, dialogue_rows, packed_row
from .token_ids import check_dataset, check_token_ids

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

    from .training_arguments import FSPADTrainingArguments

logger = logging.get_logger(__name__)

_ACCEPTED = (
    "`messages`, or `prompt_ids` + `response_ids`, or `prompt` + `completion`, or `input_ids` + `assistant_mask`"
)
_PREPARED = {"input_ids", "assistant_mask", "length"}
# So many dialogues are tokenized at once: one may be very long, but each batch is stored by itself.
_BATCH_SIZE = 16
# So many rows of a stream are read before it is said to have none to train on.
_FIRST_ROWS = 1000


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase | None,
    max_length: int | None = None,
    packing: bool = False,
) -> Dataset | IterableDataset:
    """Turn dialogues into token ids and a mask of the assistant's tokens.

    Rows in which the head has nothing to learn are dropped, and their number is logged. A dataset that was prepared
    before is returned as it is. A `features` column is kept, and never read. Streams are prepared while they are read.

    Args:
        dataset: Rows of one of these forms. If there are several, the first of this list is taken:

            - `input_ids` and `assistant_mask`, with `position_ids` if rows are packed;
            - `prompt_ids` and `response_ids`;
            - `messages`, a chat of which every turn of the assistant counts, maybe in a row of its own ([`mark_messages`]);
            - `prompt` and `completion`: two texts, of which the completion counts and gets the tokenizer's end token,
              or two lists of messages, of which the assistant's turns in the completion count, and in the prompt not.
        processing_class: The target's tokenizer; only needed for messages and text.
        max_length: Longer dialogues are cut to this many tokens: the first ones or, if those leave nothing to learn,
            those around the start of the first answer. With `features` it is always the first ones.
        packing: Whether to put several dialogues into one row of up to `max_length` tokens.

    Returns:
        A dataset with the columns `input_ids`, `assistant_mask` and `length`, and with `position_ids` if rows are packed:
        they restart at 0 with each dialogue.

    Raises:
        ValueError: If the columns are none of the accepted, messages or text come without a tokenizer or cannot be
            tokenized, a mask covers a whole dialogue, no row is left, or this dataset cannot be packed.
    """
    import datasets

    is_stream = isinstance(dataset, datasets.IterableDataset)
    columns = _column_names(dataset, is_stream)
    is_packed = columns.issuperset(PACKED)
    if packing and not is_packed:
        _check_packing(max_length, columns, is_stream)
    # Rows as they are stored: a transform would decode features, which can be gigabytes.
    tokens = dataset.with_format(None)
    is_prepared = not is_stream and columns >= _PREPARED
    if not is_prepared or (max_length is not None and max(tokens["length"][:]) > max_length):
        is_prepared = False
        tokens = _to_tokens(tokens, columns, processing_class, max_length, is_stream)
    kept = tokens.filter(_has_counted_rows, input_columns=["input_ids", "assistant_mask"])
    if is_stream:
        _check_first_rows(tokens)
        return kept
    _report_dropped(len(tokens), len(kept))
    if len(kept) == len(tokens):
        kept = tokens
    if packing and not is_packed:
        return pack_dataset(kept, max_length)
    if is_prepared and kept is tokens:
        return dataset
    if "features" in columns:
        kept = kept.with_format(dataset.format["type"], **dataset.format["format_kwargs"])
    return kept


def prepare_all(
    datasets: Any, tokenizer: PreTrainedTokenizerBase | None, args: FSPADTrainingArguments, vocab_size: int
) -> Any:
    """Prepare datasets and check their token ids.

    Args:
        datasets: A dataset, `None`, or a dictionary or tuple of these.
        tokenizer: The target's tokenizer; only needed for messages and text.
        args: Training arguments.
        vocab_size: Vocabulary size of the target.

    Returns:
        The same with prepared datasets.

    Raises:
        ValueError: As in [`prepare_dataset`], or if a token is not in the vocabulary.
    """
    if isinstance(datasets, dict):
        return {name: prepare_all(dataset, tokenizer, args, vocab_size) for name, dataset in datasets.items()}
    if isinstance(datasets, tuple):
        return tuple(prepare_all(dataset, tokenizer, args, vocab_size) for dataset in datasets)
    if datasets is None:
        return None
    dataset = prepare_dataset(datasets, tokenizer, args.max_length, args.packing)
    if hasattr(dataset, "num_rows"):  # no stream, which is checked while it is read
        check_dataset(dataset, vocab_size)
    return dataset


def _column_names(dataset: Dataset | IterableDataset, is_stream: bool) -> set[str]:
    # A stream may not know the names of its columns, nor whether it has a row.
    names = next(iter(dataset), None) if is_stream else len(dataset) and dataset.column_names
    if not names:
        raise ValueError(
            f"expected a dataset with {_ACCEPTED}, got one without rows; check the path, the split and the filters that "
            "it comes from."
        )
    return set(names)


def _check_packing(max_length: int | None, columns: set[str], is_stream: bool) -> None:
    if max_length is None:
        raise ValueError(
            "expected `max_length` with `packing=True`, got None; pass the most tokens that a row may have."
        )
    if is_stream:
        raise ValueError(
            "expected a `datasets.Dataset` with `packing=True`, got a stream; load it without `streaming=True`, or leave "
            "packing off."
        )
    if "features" in columns:
        raise ValueError(
            "expected rows without `features` with `packing=True`, got a dataset with such a column; pack the rows before "
            "their features are computed, or leave packing off."
        )


def _to_tokens(
    dataset: Dataset | IterableDataset,
    columns: set[str],
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int | None,
    is_stream: bool,
) -> Dataset | IterableDataset:
    import datasets

    form = next((form for form in [PACKED, *FORMS] if columns.issuperset(form)), None)
    if form is None:
        raise ValueError(f"expected a dataset with {_ACCEPTED}, got the columns {sorted(columns)}; rename yours.")
    if form in NEED_TOKENIZER and tokenizer is None:
        raise ValueError(
            "expected a tokenizer as `processing_class` for a dataset with "
            f"{' and '.join(f'`{name}`' for name in form)}, got None; pass the target's tokenizer, or rows with token ids."
        )
    kwargs: dict[str, Any] = {"function": packed_row, "fn_kwargs": {"max_length": max_length}}
    if form != PACKED:
        tokenizer = _unused(tokenizer) if form in NEED_TOKENIZER else None
        kwargs["fn_kwargs"] |= {"form": form, "tokenizer": tokenizer, "has_features": "features" in columns}
        # A stream is read no further than its rows are asked for
        kwargs |= {"function": dialogue_rows, "batched": True, "batch_size": 1 if is_stream else _BATCH_SIZE}
    kwargs["input_columns"] = list(form)
    if is_stream:
        return dataset.map(remove_columns=sorted(columns - {"features"}), **kwargs)
    types = {
        "input_ids": datasets.List(datasets.Value("int32")),
        "assistant_mask": datasets.List(datasets.Value("int8")),
    }
    if form == PACKED:
        types["position_ids"] = types["input_ids"]
    types["length"] = datasets.Value("int64")
    tokens = dataset.select_columns(list(form)).map(
        remove_columns=list(form), features=datasets.Features(types), desc="Tokenizing dialogues", **kwargs
    )
    if len(tokens) > len(dataset):
        logger.warning(
            f"Made {len(tokens)} rows of {len(dataset)} dialogues: the chat template changes turns of the assistant when "
            "others follow, so that the target reads each one in a text of its own."
        )
    if "features" in columns:
        # Beside the tokens, since mapping would copy them.
        tokens = datasets.concatenate_datasets([tokens, dataset.select_columns(["features"])], axis=1)
    return tokens


def _unused(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy without what a tokenizer remembers of its use, which would change the fingerprint of the cached rows."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.deprecation_warnings = {}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()
    return tokenizer


def _has_counted_rows(input_ids: list[int], assistant_mask: list[int]) -> bool:
    check_mask(input_ids, assistant_mask)
    return first_counted_row(assistant_mask) is not None


def _check_first_rows(stream: IterableDataset) -> None:
    looked_at = 0
    for row in islice(stream, _FIRST_ROWS):
        if _has_counted_rows(row["input_ids"], row["assistant_mask"]):
            return
        looked_at += 1
    _report_dropped(looked_at, 0)


def _report_dropped(before: int, after: int) -> None:
    if after == 0:
        raise ValueError(
            f"expected at least one dialogue with two tokens of the assistant in a row, got none in {before} rows; check "
            "that the chat template marks the assistant's turns, that `assistant_mask` has ones, and that `max_length` "
            "leaves room for the answers."
        )
    if after < before:
        logger.warning(f"Dropped {before - after} of {before} rows without two tokens of the assistant in a row.")


@dataclass
class DataCollatorForFSPAD:
    """Pads prepared rows on the right to a batch of tensors.

    Args:
        pad_token_id: Token id of the padding. Any will do, as no counted row ever sees it.
        vocab_size: Vocabulary size of the target, to check token ids before an accelerator fails on them; `None` for no
            check.
    """

    pad_token_id: int = 0
    vocab_size: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad rows.

        Args:
            rows: Each with `input_ids` and `assistant_mask` of one length, maybe with the `position_ids` of packed
                dialogues, and maybe with precomputed `features` of shape `(length, hidden)`; of longer features the
                first are used, so that dialogues may be cut later.

        Returns:
            `input_ids`, `attention_mask` and `assistant_mask` of shape `(batch, longest)` and dtype int64, and what the
            rows have of `position_ids` of the same and `features` of shape `(batch, longest, hidden)`. Padding is at
            position 0, so that each of its tokens is a dialogue of its own: targets tell packed dialogues apart only if
            they are given no `attention_mask`.

        Raises:
            ValueError: If a token is not in the vocabulary, or features are in another format than that of
                [`~fspad.trainer.features.add_features`].
        """
        input_ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
        if self.vocab_size is not None:
            for ids in input_ids:
                check_token_ids(ids, self.vocab_size)
        columns = {
            "input_ids": _pad(input_ids, self.pad_token_id),
            "attention_mask": _pad([torch.ones_like(ids) for ids in input_ids]),
            "assistant_mask": _pad([torch.as_tensor(row["assistant_mask"], dtype=torch.long) for row in rows]),
        }
        if "position_ids" in rows[0]:
            columns["position_ids"] = _pad([torch.as_tensor(row["position_ids"], dtype=torch.long) for row in rows])
        if "features" in rows[0]:
            if any(isinstance(row["features"], bytes) for row in rows):
                raise ValueError(
                    "expected tensors as features, got bytes as they are stored: do not set another format on a dataset from "
                    "`add_features`, nor put it together with one of another target."
                )
            columns["features"] = _pad(
                [torch.as_tensor(row["features"])[: len(ids)] for row, ids in zip(rows, input_ids, strict=True)]
            )
        return columns


def _pad(tensors: list[torch.Tensor], value: float = 0) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def count_token_frequencies(
    dataset: Dataset | IterableDataset, vocab_size: int, max_rows: int | None = None
) -> torch.Tensor:
    """Count how often the assistant writes each token.

    Args:
        dataset: A prepared dataset.
        vocab_size: Vocabulary size of the target.
        max_rows: Count only in the first so many rows, e.g. of a stream.

    Returns:
        Counts of shape `(vocab_size,)` and dtype int64.

    Raises:
        ValueError: If a token is not in the vocabulary.
    """
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for row in islice(dataset.select_columns(["input_ids", "assistant_mask"]), max_rows):
        ids = torch.as_tensor(row["input_ids"])[torch.as_tensor(row["assistant_mask"]).bool()]
        check_token_ids(ids, vocab_size)
        counts += torch.bincount(ids, minlength=vocab_size)
    return counts


def most_frequent_tokens(counts: torch.Tensor, size: int, special_ids: Iterable[int] = ()) -> torch.Tensor:
    """Choose a draft vocabulary for `head.set_draft_vocabulary`.

    Args:
        counts: Counts of shape `(vocab,)`.
        size: How many tokens to choose.
        special_ids: Tokens that are in whatever their count, e.g. `tokenizer.all_special_ids`.

    Returns:
        Distinct token ids of shape `(size,)`: the special tokens, then the others from frequent to rare.

    Raises:
        ValueError: If `size` is not between the number of special tokens and the vocabulary size.
    """
    special = torch.tensor(sorted(set(special_ids)), dtype=torch.long)
    if not max(1, special.numel()) <= size <= counts.numel():
        raise ValueError(
            f"expected a draft vocabulary of {max(1, special.numel())} (the special tokens) to {counts.numel()} tokens "
            f"(the vocabulary), got {size}; choose a size between."
        )
    # A stable sort, so that tokens of one count keep the order of their ids on every machine.
    others = torch.argsort(counts, descending=True, stable=True)
    others = others[~torch.isin(others, special)]
    return torch.cat([special, others])[:size]
