"""From text to token ids, and which of them the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def tokenize_messages(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, first_turn: int = 0
) -> tuple[list[int], list[int]]:
    """Tokenize a chat with the tokenizer's template, and mask the assistant's turns.

    The turns are those of the template's `{% generation %}` blocks, or what the template adds to the prompt before them.

    Args:
        messages: The chat, each message with `role` and `content`. An empty one has no tokens.
        tokenizer: The target's tokenizer.
        first_turn: Turns of the assistant before this message are not masked.

    Returns:
        Token ids, and as many values of a mask: 1 for what the assistant wrote in its turns, up to the end token.

    Raises:
        ValueError: If a message is malformed, or there is no template that the turns can be told with.
    """
    if not messages:
        return [], []
    _check_messages(messages)
    if tokenizer.chat_template is None:
        raise ValueError(
            "expected a tokenizer with a chat template, got one without: set `tokenizer.chat_template`, or pass `prompt` "
            "and `completion` as text."
        )
    has_blocks = _GENERATION_BLOCK.search(tokenizer.get_chat_template())
    try:
        return (_from_generation_blocks if has_blocks else _from_prompts)(messages, tokenizer, first_turn)
    except (TemplateError, TypeError) as error:
        raise ValueError(
            f"expected messages that the chat template can render, got {_excerpt(messages)}, of which it says: {error}; "
            "leave such dialogues out, or set another `tokenizer.chat_template`."
        ) from error


def tokenize_prompt_and_completion(
    prompt: str | list[dict[str, Any]], completion: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Tokenize a prompt and what followed it.

    Args:
        prompt: Text, or messages.
        completion: The same. Text gets the tokenizer's end token, if it does not have it; of messages the assistant's
            turns are masked.
        tokenizer: The target's tokenizer.

    Returns:
        Token ids, and as many values of a mask: 1 for what the assistant wrote in the completion. Nothing, if either is
        empty.

    Raises:
        ValueError: If one is text and the other is not, or messages cannot be tokenized.
    """
    if not prompt or not completion:
        return [], []
    texts = (isinstance(prompt, str), isinstance(completion, str))
    if texts[0] != texts[1] or not all(isinstance(part, Sequence) for part in (prompt, completion)):
        raise ValueError(
            "expected `prompt` and `completion` to be two texts or two lists of messages, got "
            f"{_excerpt(prompt)} and {_excerpt(completion)}; turn one into the form of the other."
        )
    if not isinstance(prompt, str):
        return tokenize_messages([*prompt, *completion], tokenizer, first_turn=len(prompt))
    end = tokenizer.eos_token or ""
    if not completion.endswith(end):
        completion += end
    prompt_ids = list(tokenizer(prompt)["input_ids"])
    input_ids = list(tokenizer(prompt + completion)["input_ids"])
    if input_ids[: len(prompt_ids)] != prompt_ids:
        # A token would lie across the border. At inference none does: the prompt is tokenized alone.
        input_ids = prompt_ids + tokenizer(completion, add_special_tokens=False)["input_ids"]
    return input_ids, [0] * len(prompt_ids) + [1] * (len(input_ids) - len(prompt_ids))


def _check_messages(messages: list[dict[str, Any]]) -> None:
    if not isinstance(messages, Sequence):
        raise ValueError(f"expected a list of messages, got {_excerpt(messages)}; give each dialogue such a list.")
    for message in messages:
        is_message = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not is_message or (message.get("content") is None and not message.get("tool_calls")):
            raise ValueError(
                f"expected messages with `role` and `content`, got {_excerpt(message)} in {_excerpt(messages)}; give each "
                "message these two keys."
            )


def _from_generation_blocks(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, first_turn: int
) -> tuple[list[int], list[int]]:
    encoded = tokenizer.apply_chat_template(
        messages,
        return_assistant_tokens_mask=True,
        return_dict=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    prompt = ""
    if first_turn:
        prompt = _render_prompt(messages, first_turn, tokenizer)
        _check_prefix(prompt, tokenizer.apply_chat_template(messages, tokenize=False), first_turn)
    starts = [start for start, _ in encoded["offset_mapping"]]
    mask = [int(value and a >= len(prompt)) for value, a in zip(encoded["assistant_masks"], starts, strict=True)]
    return list(encoded["input_ids"]), mask


def _from_prompts(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, first_turn: int
) -> tuple[list[int], list[int]]:
    """Find the assistant's turns between two renderings of the template: up to the turn, and with it."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    assistant_mask = [0] * len(input_ids)
    # A dialogue that the assistant opens has no prompt for its first turn.
    for turn in range(max(1, first_turn), len(messages)):
        if messages[turn]["role"] != "assistant":
            continue
        before = _render_prompt(messages, turn, tokenizer)
        through = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        _check_prefix(before, through, turn)
        _check_prefix(through, text, turn)
        # A token across the border counts as the prompt's: at inference the prompt is tokenized alone.
        span = [i for i, (a, b) in enumerate(offsets) if a >= len(before) and b <= len(through) and b > a]
        # What a template writes after the end token (a line break, mostly) is not generated.
        ends = [i for i in span if input_ids[i] == tokenizer.eos_token_id]
        for i in span:
            assistant_mask[i] = int(not ends or i <= ends[-1])
    return input_ids, assistant_mask


def _render_prompt(messages: list[dict[str, Any]], turn: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands before a turn; if it is the assistant's, with what asks for it."""
    return tokenizer.apply_chat_template(
        messages[:turn], tokenize=False, add_generation_prompt=messages[turn]["role"] == "assistant"
    )


def _check_prefix(prefix: str, text: str, turn: int) -> None:
    if not text.startswith(prefix):
        raise ValueError(
            f"expected a chat template that leaves what it wrote up to turn {turn} as it is when messages follow, got "
            f"{text!r}, which does not start with {prefix!r}; put a {{% generation %}} block into the template, or pass "
            "token ids."
        )


def _excerpt(value: Any) -> str:
    return shorten(repr(value), 500)
