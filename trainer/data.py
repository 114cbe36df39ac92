"""From rows of dialogues to padded batches: which tokens there are, and which of them the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from .loss import counted_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ACCEPTED = "`messages`, or `prompt_ids` + `response_ids`, or `input_ids` + `assistant_mask`"
_PREPARED = {"input_ids", "assistant_mask", "length"}


def prepare_dataset(
    dataset: Dataset, processing_class: PreTrainedTokenizerBase | None, max_length: int | None = None
) -> Dataset:
    """Turn dialogues into token ids and a mask of the assistant's tokens.

    Rows in which the head has nothing to learn after truncation are dropped, and their number is logged. A dataset
    that was prepared before is returned as it is. A `features` column is kept.

    Args:
        dataset: Rows with `messages` (a chat), with `prompt_ids` and `response_ids`, or with `input_ids` and
            `assistant_mask`.
        processing_class: The target's tokenizer; only needed for `messages`.
        max_length: Longer dialogues are cut to this many tokens.

    Returns:
        A dataset with the columns `input_ids`, `assistant_mask` and `length`.

    Raises:
        ValueError: If the columns are none of the accepted, `messages` come without a tokenizer, a mask covers a
            whole dialogue, or no row is left.
    """
    columns = set(dataset.column_names or next(iter(dataset)))
    if columns >= _PREPARED and (max_length is None or max(dataset["length"]) <= max_length):
        return dataset
    form = next((form for form in _FORMS if columns.issuperset(form)), None)
    if form is None:
        raise ValueError(f"expected a dataset with {_ACCEPTED}, got the columns {sorted(columns)}; rename yours.")
    if form == ("messages",) and processing_class is None:
        raise ValueError(
            "expected a tokenizer as `processing_class` for a dataset with `messages`, got None; pass the target's "
            "tokenizer, or rows with token ids."
        )

    def tokenize(*values: Any) -> dict[str, Any]:
        input_ids, assistant_mask = _FORMS[form](*values, processing_class)
        return _check_and_truncate(input_ids, assistant_mask, max_length)

    prepared = dataset.map(
        tokenize, input_columns=list(form), remove_columns=sorted(columns - {*_PREPARED, "features"})
    )
    # Of columns that a row does not need nothing may be read here: features can be gigabytes.
    kept = prepared.filter(_has_counted_rows, input_columns=["assistant_mask"])
    if hasattr(prepared, "__len__"):
        _report_dropped(len(prepared), len(kept))
    return kept


def _report_dropped(before: int, after: int) -> None:
    if after == 0:
        raise ValueError(
            f"expected at least one dialogue with two tokens of the assistant in a row, got none in {before} rows; check "
            "that the chat template marks the assistant's turns, that `assistant_mask` has ones, and that `max_length` "
            "leaves room for the answers."
        )
    if after < before:
        logger.warning(f"Dropped {before - after} of {before} rows without tokens of the assistant within max_length.")


def _has_counted_rows(assistant_mask: list[int]) -> bool:
    return bool(counted_rows(torch.as_tensor(assistant_mask)).any())


def _check_and_truncate(input_ids: list[int], assistant_mask: list[int], max_length: int | None) -> dict[str, Any]:
    if len(input_ids) != len(assistant_mask):
        raise ValueError(
            f"expected one mask value for each token, got {len(input_ids)} input_ids and {len(assistant_mask)} values "
            "of assistant_mask; rebuild the row."
        )
    if input_ids and all(assistant_mask):
        raise ValueError(
            f"expected a mask of the assistant's tokens, got ones for all {len(input_ids)} tokens; the prompt must be "
            "in the row and be masked with zeros."
        )
    input_ids, assistant_mask = input_ids[:max_length], assistant_mask[:max_length]
    return {"input_ids": input_ids, "assistant_mask": assistant_mask, "length": len(input_ids)}


def _from_messages(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    if _GENERATION_BLOCK.search(tokenizer.get_chat_template()):
        encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        return list(encoded["input_ids"]), [int(value) for value in encoded["assistant_masks"]]
    return _from_role_markers(messages, tokenizer)


def _from_role_markers(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Find the assistant's turns between two renderings of the template: up to the turn, and with it."""

    def render(end: int, add_generation_prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            messages[:end], tokenize=False, add_generation_prompt=add_generation_prompt
        )

    text = render(len(messages))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    assistant_mask = [0] * len(input_ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, through = render(turn, add_generation_prompt=True), render(turn + 1)
        if not (through.startswith(before) and text.startswith(through)):
            raise ValueError(
                f"expected a chat template that renders turn {turn} after its prompt, got {through!r} for the prompt "
                f"{before!r} in {text!r}; put a {{% generation %}} block into the template, or pass token ids."
            )
        # A token across the border counts as the prompt's: at inference the prompt is tokenized alone.
        span = [i for i, (a, b) in enumerate(offsets) if a >= len(before) and b <= len(through) and b > a]
        # What a template writes after the end token (a line break, mostly) is not generated.
        ends = [i for i in span if input_ids[i] == tokenizer.eos_token_id]
        for i in span:
            assistant_mask[i] = int(not ends or i <= ends[-1])
    return input_ids, assistant_mask


def _from_prompt_and_response(prompt: list[int], response: list[int], _: Any) -> tuple[list[int], list[int]]:
    return [*prompt, *response], [0] * len(prompt) + [1] * len(response)


def _from_mask(input_ids: list[int], assistant_mask: list[int], _: Any) -> tuple[list[int], list[int]]:
    return list(input_ids), [int(value) for value in assistant_mask]


# Token ids before text: they are what the target really wrote.
_FORMS = {
    ("input_ids", "assistant_mask"): _from_mask,
    ("prompt_ids", "response_ids"): _from_prompt_and_response,
    ("messages",): _from_messages,
}


@dataclass
class DataCollatorForFSPAD:
    """Pads prepared rows on the right to a batch of tensors.

    Args:
        pad_token_id: Token id of the padding. Any will do, as no counted row ever sees it.
    """

    pad_token_id: int = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad rows.

        Args:
            rows: Each with `input_ids` and `assistant_mask` of one length, and maybe with precomputed `features` of shape
                `(length, hidden)`; of longer features the first are used, so that dialogues may be cut later.

        Returns:
            `input_ids`, `attention_mask` and `assistant_mask` of shape `(batch, longest)` and dtype int64, and maybe
            `features` of shape `(batch, longest, hidden)`.
        """
        input_ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
        columns = {
            "input_ids": _pad(input_ids, self.pad_token_id),
            "attention_mask": _pad([torch.ones_like(ids) for ids in input_ids]),
            "assistant_mask": _pad([torch.as_tensor(row["assistant_mask"], dtype=torch.long) for row in rows]),
        }
        if "features" in rows[0]:
            columns["features"] = _pad(
                [torch.as_tensor(row["features"])[: len(ids)] for row, ids in zip(rows, input_ids, strict=True)]
            )
        return columns


def _pad(tensors: list[torch.Tensor], value: float = 0) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def count_token_frequencies(dataset: Dataset, vocab_size: int) -> torch.Tensor:
    """Count how often the assistant writes each token.

    Args:
        dataset: A prepared dataset.
        vocab_size: Vocabulary size of the target.

    Returns:
        Counts of shape `(vocab_size,)` and dtype int64.
    """
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for row in dataset.select_columns(["input_ids", "assistant_mask"]):
        ids = torch.as_tensor(row["input_ids"])[torch.as_tensor(row["assistant_mask"]).bool()]
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
