"""From one dialogue to rows of token ids and a mask of the assistant's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .chat import mark_messages, mark_prompt_and_completion
from .marked_text import first_counted_row, tokenize_enough
from .token_ids import to_integers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKED = ("input_ids", "assistant_mask", "position_ids")


def dialogue_rows(
    *columns: list[Any],
    form: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int | None,
    has_features: bool,
) -> dict[str, list[Any]]:
    """Turn a batch of dialogues into rows.

    Args:
        *columns: The columns of the form.
        form: One of `FORMS`.
        tokenizer: The target's tokenizer, for text.
        max_length: Most tokens of a row.
        has_features: Whether each dialogue has features, of which the first belong to the row.

    Returns:
        The columns `input_ids`, `assistant_mask` and `length`: a row for each dialogue, or several where the chat
        template shows its turns in several texts.

    Raises:
        ValueError: If a dialogue is not of this form, or a mask covers all of it.
    """
    rows: dict[str, list[Any]] = {"input_ids": [], "assistant_mask": [], "length": []}
    for values in zip(*columns, strict=True):
        for input_ids, assistant_mask in _tokenize(form, values, tokenizer, max_length, has_features):
            check_mask(input_ids, assistant_mask)
            start = 0 if has_features or max_length is None else window_start(assistant_mask, max_length)
            end = None if max_length is None else start + max_length
            input_ids = input_ids[start:end]
            rows["input_ids"].append(input_ids)
            # Nothing predicts the first token, and a mask that covers all that is left would look like a wrong one.
            rows["assistant_mask"].append([0, *assistant_mask[start:end][1:]] if input_ids else [])
            rows["length"].append(len(input_ids))
    return rows


def packed_row(
    input_ids: Sequence[int], assistant_mask: Sequence[int], position_ids: Sequence[int], max_length: int | None
) -> dict[str, Any]:
    """Check a row that several dialogues were packed into.

    Args:
        input_ids: Token ids.
        assistant_mask: 1 where a token is the assistant's.
        position_ids: Positions, which restart at 0 with each dialogue.
        max_length: Most tokens that it may have.

    Returns:
        The columns `input_ids`, `assistant_mask`, `position_ids` and `length`.

    Raises:
        ValueError: If it is longer, or the columns do not fit together.
    """
    input_ids, assistant_mask, position_ids = map(to_integers, (input_ids, assistant_mask, position_ids))
    check_mask(input_ids, assistant_mask)
    if len(position_ids) != len(input_ids):
        raise ValueError(
            f"expected one position for each token, got {len(input_ids)} input_ids and {len(position_ids)} position_ids; "
            "rebuild the row."
        )
    if max_length is not None and len(input_ids) > max_length:
        raise ValueError(
            f"expected packed rows of at most max_length={max_length} tokens, got one of {len(input_ids)}; pack the "
            "dialogues again with this max_length."
        )
    assistant_mask = [value if position else 0 for value, position in zip(assistant_mask, position_ids, strict=True)]
    row = {"input_ids": input_ids, "assistant_mask": assistant_mask, "position_ids": position_ids}
    return {**row, "length": len(input_ids)}


def window_start(assistant_mask: list[int], max_length: int) -> int:
    """Choose where to cut so that a row counts, if one of the dialogue does; at the beginning if that will do.

    Args:
        assistant_mask: 1 where a token is the assistant's.
        max_length: So many tokens are left.

    Returns:
        The first token that is left.
    """
    first_row = first_counted_row(assistant_mask)
    if first_row is None or first_row + 2 < max_length:
        return 0
    first_token = first_row + 1
    return max(0, min(first_token - max_length // 2, len(assistant_mask) - max_length))


def check_mask(input_ids: list[int], assistant_mask: list[int]) -> None:
    """Check that a mask can be that of a row.

    Args:
        input_ids: Token ids.
        assistant_mask: 1 where a token is the assistant's.

    Raises:
        ValueError: If it has another length, or covers everything.
    """
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


def _tokenize(
    form: tuple[str, ...],
    values: tuple[Any, ...],
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int | None,
    has_features: bool,
) -> list[tuple[list[int], list[int]]]:
    if form not in NEED_TOKENIZER:
        return [FORMS[form](*values)]
    texts = FORMS[form](*values, tokenizer, has_features=has_features)
    # One row even if there is nothing to learn, so that it is counted among the dropped ones
    return [tokenize_enough(text, max_length, from_start=has_features) for text in texts] or [([], [])]


def _from_mask(input_ids: Sequence[int], assistant_mask: Sequence[int]) -> tuple[list[int], list[int]]:
    return to_integers(input_ids), to_integers(assistant_mask)


def _from_prompt_and_response(prompt: Sequence[int], response: Sequence[int]) -> tuple[list[int], list[int]]:
    prompt, response = to_integers(prompt), to_integers(response)
    # Without a prompt there is nothing that the response was drafted after.
    return (prompt + response, [0] * len(prompt) + [1] * len(response)) if prompt else ([], [])


# Token ids before text: they are what the target really wrote.
FORMS = {
    ("input_ids", "assistant_mask"): _from_mask,
    ("prompt_ids", "response_ids"): _from_prompt_and_response,
    ("messages",): mark_messages,
    ("prompt", "completion"): mark_prompt_and_completion,
}
NEED_TOKENIZER = (("messages",), ("prompt", "completion"))
