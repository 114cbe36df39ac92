"""From messages to text, and where in it the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from .marked_text import MarkedChat, PromptAndCompletion, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Not a text that anybody would write, and the same after every template
PLACEHOLDER = "FSPAD-USER-TURN"
# What templates know. Of another one they write the name or nothing at all, and the target has never read either.
_ROLES = ("system", "developer", "user", "assistant", "tool")
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def mark_messages(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, first_turn: int = 0, has_features: bool = False
) -> list[MarkedChat | PromptAndCompletion]:
    """Write a chat with the tokenizer's template, and mark the assistant's turns.

    The turns are those of the template's `{% generation %}` blocks, or what the template adds to the prompt before them.
    A template that changes a turn when others follow (thoughts are left out, mostly) shows the target each turn in a text
    of its own, so that each one becomes a chat of its own: the prompt before the turn, and the turn as it is when it is
    the last.

    Args:
        messages: The chat, each message with `role` and `content`.
        tokenizer: The target's tokenizer.
        first_turn: Turns of the assistant before this message are not marked.
        has_features: Whether features were computed for the chat, so that it can only be taken whole.

    Returns:
        The chat, or one for each turn of the assistant; none for an empty one.

    Raises:
        ValueError: If a message is malformed, there is no template that the turns can be told with, or the chat would
            have to be taken apart and has features.
    """
    if not messages:
        return []
    _check_messages(messages)
    check_chat_template(tokenizer, "or pass `prompt` and `completion` as text")
    if not tokenizer.is_fast:
        raise ValueError(
            f"expected a tokenizer that tells where in a text its tokens are, got {type(tokenizer).__name__}, which is written "
            "in Python; pass `prompt` and `completion` as text, or token ids."
        )
    # Arrow gives every dictionary the keys of all others
    messages = _without_none(messages)
    has_blocks = _GENERATION_BLOCK.search(tokenizer.get_chat_template())
    turns = [i for i, message in enumerate(messages) if i >= first_turn and message["role"] == "assistant"]
    with template_errors(messages):
        chat = (_mark_blocks if has_blocks else _mark_turns)(messages, tokenizer, first_turn, turns)
        if chat is not None:
            return [chat]
        if has_features:
            raise ValueError(
                "expected a chat template that leaves earlier turns as they are, since a row with `features` cannot be "
                f"taken apart, got one that changes a turn of {_excerpt(messages)}; drop the column `features`, or pass "
                "token ids."
            )
        mark_one = _mark_last_blocks if has_blocks else _mark_last_turn
        # A dialogue that the assistant opens has no prompt for its first turn.
        return [mark_one(messages[: turn + 1], tokenizer) for turn in turns if turn > 0]


def mark_prompt_and_completion(
    prompt: str | list[dict[str, Any]],
    completion: str | list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    has_features: bool = False,
) -> list[MarkedChat | PromptAndCompletion]:
    """Put a prompt and what followed it together, and mark what the assistant wrote in the completion.

    Args:
        prompt: Text, or messages.
        completion: The same. Text gets the tokenizer's end token, if it does not have it; of messages the assistant's
            turns are marked.
        tokenizer: The target's tokenizer.
        has_features: As in [`mark_messages`].

    Returns:
        The dialogue, or several as in [`mark_messages`]; none if either is empty.

    Raises:
        ValueError: If one is text and the other is not, or messages cannot be marked.
    """
    if not prompt or not completion:
        return []
    texts = (isinstance(prompt, str), isinstance(completion, str))
    if texts[0] != texts[1] or not all(isinstance(part, Sequence) for part in (prompt, completion)):
        raise ValueError(
            "expected `prompt` and `completion` to be two texts or two lists of messages, got "
            f"{_excerpt(prompt)} and {_excerpt(completion)}; turn one into the form of the other."
        )
    if not isinstance(prompt, str):
        return mark_messages([*prompt, *completion], tokenizer, len(prompt), has_features)
    end = tokenizer.eos_token or ""
    if not completion.endswith(end):
        completion += end
    return [PromptAndCompletion(tokenizer, prompt + completion, len(prompt))]


def check_chat_template(tokenizer: PreTrainedTokenizerBase, alternative: str) -> None:
    """Check that a tokenizer has a chat template.

    Args:
        tokenizer: The target's tokenizer.
        alternative: What else than setting one can be done, for the message.

    Raises:
        ValueError: If it has none.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"expected a tokenizer with a chat template, got one without: set `tokenizer.chat_template`, {alternative}."
        )


@contextmanager
def template_errors(messages: list[dict[str, Any]]) -> Iterator[None]:
    """Say in one line that a chat template refuses messages inside of the `with` block, or fails on them.

    Args:
        messages: The messages.

    Raises:
        ValueError: In place of whatever the template raises.
    """
    try:
        yield
    except (AttributeError, LookupError, TemplateError, TypeError) as error:
        raise ValueError(
            f"expected messages that the chat template can render, got {_excerpt(messages)}, of which it says: "
            f"{_excerpt(str(error), quoted=False)}; leave such dialogues out, or set another `tokenizer.chat_template`."
        ) from error


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
        if message["role"] not in _ROLES:
            raise ValueError(
                f"expected messages of the roles {', '.join(_ROLES[:-1])} or {_ROLES[-1]}, got the role "
                f"{_excerpt(message['role'])} in {_excerpt(messages)}; rename it, or leave the dialogue out."
            )


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_without_none(part) for part in value]
    return value


def _mark_turns(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, first_turn: int, turns: list[int]
) -> MarkedChat | None:
    """Find the assistant's turns between two texts of the template: up to the turn, and with it.

    Returns:
        The marked chat; `None` if the template changes turns when others follow.
    """
    text = _render(messages, tokenizer)
    spans = []
    for turn in turns:
        if turn == 0:
            continue
        before = _render(messages[:turn], tokenizer, asks=True)
        through = text if turn == len(messages) - 1 else _render(messages[: turn + 1], tokenizer)
        if not (through.startswith(before) and text.startswith(through)):
            return None
        spans.append(_span(text, len(before), len(through), tokenizer))
    return MarkedChat(tokenizer, text, spans)


def _mark_last_turn(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> MarkedChat:
    prompt = _render(messages[:-1], tokenizer, asks=True)
    text = _render(messages, tokenizer)
    if not text.startswith(prompt):
        # To ask for a turn, the template writes what it leaves out of a given one (a block of no thoughts, mostly).
        # Trained on is the prompt as the target reads it, and after it what the turn goes on with.
        before = _render(messages[:-1], tokenizer)
        example = _render([*messages[:-1], {"role": "assistant", "content": PLACEHOLDER}], tokenizer)
        if not all(other.startswith(before) for other in (prompt, text, example)):
            raise ValueError(
                "expected a chat template that writes the same of the messages before a turn with it as without it, got "
                f"{_excerpt(text)}, which does not start with {_excerpt(before)}; put a {{% generation %}} block into the "
                "template, or pass token ids."
            )
        letters = zip(*(other[len(before) :] for other in (prompt, text, example)), strict=False)
        both = sum(1 for _ in takewhile(lambda same: len(set(same)) == 1, letters))
        text = prompt + text[len(before) + both :]
    return MarkedChat(tokenizer, text, [_span(text, len(prompt), len(text), tokenizer)])


def _span(text: str, start: int, end: int, tokenizer: PreTrainedTokenizerBase) -> Span:
    """A turn up to its end token: what a template writes after it (a line break, mostly) is not generated."""
    end_token = text.rfind(tokenizer.eos_token, start, end) if tokenizer.eos_token else -1
    return Span(start, end if end_token < 0 else end_token, end)


def _mark_blocks(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, first_turn: int, turns: list[int]
) -> MarkedChat | None:
    """Take the turns from the generation blocks of the template.

    Returns:
        The marked chat; `None` if the template changes turns when others follow.
    """
    text, spans = _render_blocks(messages, tokenizer)
    prompt = ""
    if first_turn:
        asks = messages[first_turn]["role"] == "assistant"
        prompt = _render(messages[:first_turn], tokenizer, asks)
        if not text.startswith(prompt):
            return None
    for turn in turns:
        if turn < len(messages) - 1:
            through, blocks = _render_blocks(messages[: turn + 1], tokenizer)
            # What is written after a turn need not be the same: it is not the assistant's.
            if not text.startswith(through[: blocks[-1].end] if blocks else through):
                return None
    return MarkedChat(tokenizer, text, spans, takes_borders=True, counted_from=len(prompt))


def _mark_last_blocks(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> MarkedChat:
    text, spans = _render_blocks(messages, tokenizer)
    before = _render(messages[:-1], tokenizer)
    # If what comes before the turn is another text without it, a turn is taken to have one block
    last = [span for span in spans if span.start >= len(before)] if text.startswith(before) else spans[-1:]
    return MarkedChat(tokenizer, text, last, takes_borders=True)


def _render(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, asks: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)


def _render_blocks(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    # As `apply_chat_template` calls it, which tells the blocks only of a text that it has tokenized whole
    (text,), (blocks,) = render_jinja_template(
        [messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return text, [Span(start, end - 1, end) for start, end in blocks if end > start]


def _excerpt(value: Any, quoted: bool = True) -> str:
    # Cut before it is split into words, as it may be megabytes
    return shorten((repr(value) if quoted else value)[:2000], 500)
