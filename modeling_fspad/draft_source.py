"""What a source of drafts is: it takes in what the target has emitted, and proposes what may come next.

A further source is one file with one class, which [`~fspad.FSPADModel.draft_sources`] returns besides the others. Sources
only propose: whatever they say, the target decides, and the text stays its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .candidates import Candidates

if TYPE_CHECKING:
    from .draft_size import DraftSize


@dataclass
class Emitted:
    """What the target has shown since the last time: the prompt and its first new token, then what each step emits.

    Args:
        token_ids: New tokens of each row, the last one being the root of the next draft. Of a prompt that came as
            embeddings only the first new token is known.
        features: The target's features at positions t, of shape `(batch, length, hidden)`.
        next_embeds: The target's embeddings of the tokens at t+1, of the same shape.
        position_ids: Positions t, counted from the first true token, of shape `(batch, length)`.
        padding_mask: 1 for true positions and 0 for padding, of shape `(batch, length)`; `None` for no padding.
    """

    token_ids: list[list[int]]
    features: torch.Tensor
    next_embeds: torch.Tensor
    position_ids: torch.LongTensor
    padding_mask: torch.Tensor | None = None


class DraftSource:
    """Proposes continuations of a text. One object a call of `generate`; nothing is kept on head or target."""

    def extend(self, emitted: Emitted) -> None:
        """Take in what the target has emitted. Called after the prefill and after every step.

        What a source has proposed for these positions can be judged by it.

        Args:
            emitted: Tokens and features.
        """
        raise NotImplementedError

    def propose(self, candidates: list[Candidates], size: DraftSize, max_depth: int) -> None:
        """Add continuations of the last emitted token.

        Args:
            candidates: What sources before this one have proposed, one collection a row.
            size: Tells whether further drafting is worth its time.
            max_depth: Levels below the root that may still be of use.
        """
        raise NotImplementedError
