"""Dialogues as text that is marked where the assistant wrote, and as much of their tokens as is trained on."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from .loss import counted_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# So many characters a token are tokenized first: about four are common, and where there are more, more are taken.
_CHARACTERS_A_TOKEN = 16
_LEAST_CHARACTERS = 8192


class Span(NamedTuple):
    """What the assistant wrote: tokens that begin at `start` to `last`, and end by `end`. Counted in characters."""

    start: int
    last: int
    end: int


class Tokens(NamedTuple):
    """Token ids, as many values of the assistant's mask, and from where to where in the text each token reaches."""

    ids: list[int]
    mask: list[int]
    places: list[tuple[int, int]]


@dataclass(frozen=True)
class MarkedChat:
    """A chat as its template wrote it.

    Args:
        tokenizer: The target's tokenizer.
        text: The whole chat.
        spans: What the assistant wrote, in order.
        takes_borders: Whether a token across the border of a span is the assistant's.
        counted_from: No token before this character is the assistant's.
    """

    tokenizer: PreTrainedTokenizerBase
    text: str
    spans: list[Span]
    takes_borders: bool = False
    counted_from: int = 0

    def encode(self, start: int, stop: int) -> Tokens:
        """Tokenize the characters from `start` to `stop`.

        Args:
            start: The first one.
            stop: The one after the last.

        Returns:
            The tokens.
        """
        ids, places = _encode(self.tokenizer, self.text[start:stop], start, add_special_tokens=False)
        starts = [span.start for span in self.spans]
        mask = []
        for a, b in places:
            span = bisect_right(starts, b - 1 if self.takes_borders else a) - 1
            is_inside = span >= 0 and a <= self.spans[span].last and (self.takes_borders or b <= self.spans[span].end)
            mask.append(int(is_inside and self.counted_from <= a < b))
        return Tokens(ids, mask, places)


@dataclass(frozen=True)
class PromptAndCompletion:
    """Two texts, of which the second is the assistant's.

    Args:
        tokenizer: The target's tokenizer.
        text: Both.
        border: How many characters the prompt has.
    """

    tokenizer: PreTrainedTokenizerBase
    text: str
    border: int

    @property
    def spans(self) -> list[Span]:
        """What the assistant wrote."""
        return [Span(self.border, len(self.text), len(self.text))]

    def encode(self, start: int, stop: int) -> Tokens:
        """Tokenize the characters from `start` to `stop`, as one text if no token lies across the border.

        Args:
            start: The first one, in the prompt.
            stop: The one after the last.

        Returns:
            The tokens.
        """
        border = min(self.border, stop)
        ids, places = prompt_ids, prompt_places = _encode(self.tokenizer, self.text[start:border], start)
        if stop > border:
            ids, places = _encode(self.tokenizer, self.text[start:stop], start)
            if ids[: len(prompt_ids)] != prompt_ids:
                # A token would lie across the border. At inference none does: the prompt is tokenized alone.
                ids, places = _encode(self.tokenizer, self.text[border:stop], border, add_special_tokens=False)
                ids, places = prompt_ids + ids, prompt_places + places
        return Tokens(ids, [0] * len(prompt_ids) + [1] * (len(ids) - len(prompt_ids)), places)


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: str, start: int, **kwargs: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    if not tokenizer.is_fast:
        ids = list(tokenizer(text, **kwargs)["input_ids"])
        return ids, [(start, start)] * len(ids)
    encoded = tokenizer(text, return_offsets_mapping=True, **kwargs)
    return list(encoded["input_ids"]), [(start + a, start + b) for a, b in encoded["offset_mapping"]]


def tokenize_enough(
    dialogue: MarkedChat | PromptAndCompletion, max_length: int | None, from_start: bool = False
) -> tuple[list[int], list[int]]:
    """Tokenize as much of a dialogue as it takes to choose the tokens to train on as from the whole.

    Tokenizing takes seconds for a megabyte of text, and more than a hundred bytes of memory for each byte of it.

    Args:
        dialogue: The dialogue.
        max_length: So many tokens are trained on: the first ones or those around the first answer, as
            [`~fspad.trainer.rows.window_start`] chooses; `None` for all.
        from_start: Whether it is always the first ones.

    Returns:
        Token ids and mask, of the whole or of a part that the same tokens are chosen from.
    """
    length = len(dialogue.text)
    if max_length is None or not dialogue.tokenizer.is_fast:
        return dialogue.encode(0, length)[:2]
    beginning = _tokenize_around(dialogue, 0, 0, max_length, from_start)
    # Up to where no answer has anything to learn
    searched = beginning.places[-1][1] if beginning.places else length
    if from_start or first_counted_row(beginning.mask) is not None:
        return beginning[:2]
    for span in dialogue.spans:
        if span.end > searched:
            part = _tokenize_around(dialogue, span.start, span.end, max_length)
            if first_counted_row(part.mask) is not None:
                return part[:2]
            searched = max(searched, part.places[-1][1])
    return beginning[:2]


def first_counted_row(assistant_mask: list[int]) -> int | None:
    """Find the first row of a dialogue that counts in the loss.

    Args:
        assistant_mask: 1 where a token is the assistant's.

    Returns:
        Its number, or `None`.
    """
    rows = counted_rows(torch.as_tensor(assistant_mask)).nonzero()
    return int(rows[0]) if len(rows) else None


def _tokenize_around(
    dialogue: MarkedChat | PromptAndCompletion, center: int, end: int, max_length: int, from_start: bool = False
) -> Tokens:
    """Tokenize around a character: enough for the window of the first row that counts, or up to `end` if none does."""
    length = len(dialogue.text)
    reach = max(_CHARACTERS_A_TOKEN * max_length, _LEAST_CHARACTERS)
    while (start := max(0, center - reach)) > 0 or center + reach < length:
        stop = min(length, center + reach)
        tokens = _tokenize_part(dialogue, start, stop, reach // 4)
        reach *= 2
        # Of nothing but ones, the mask of a whole dialogue is an error
        if tokens is None or all(tokens.mask):
            continue
        first = None if from_start else first_counted_row(tokens.mask)
        if first is None:
            suffices = tokens.places[-1][1] >= end and (start > 0 or len(tokens.ids) >= max_length)
        elif start == 0 and first + 2 < max_length:
            suffices = len(tokens.ids) >= max_length
        else:
            has_end = stop == length or len(tokens.ids) >= first + 2 + max_length
            suffices = has_end and (start == 0 or first >= max_length)
        if suffices:
            return tokens
    return dialogue.encode(0, length)


def _tokenize_part(dialogue: MarkedChat | PromptAndCompletion, start: int, stop: int, margin: int) -> Tokens | None:
    """Tokenize a part of a text as it would be tokenized in the whole.

    A cut changes the tokens near it, which are left out, and may change all of a long run of spaces, digits or the like:
    then they are others if the cut is elsewhere.

    Returns:
        The tokens that are further from the cuts than `margin`; `None` if they depend on where the cuts are.
    """
    is_cut, is_cut_after = start > 0, stop < len(dialogue.text)
    first, last = start + margin * is_cut, stop - margin * is_cut_after

    def tokenize(start: int, stop: int) -> Tokens:
        ids, mask, places = dialogue.encode(start, stop)
        begin = next((i for i, (a, _) in enumerate(places) if a >= first), len(ids))
        end = next((i for i in range(begin, len(ids)) if places[i][1] > last), len(ids))
        return Tokens(ids[begin:end], mask[begin:end], places[begin:end])

    tokens = tokenize(start, stop)
    others = tokenize(start + is_cut, stop - is_cut_after)
    return tokens if (tokens.ids, tokens.mask) == (others.ids, others.mask) else None
