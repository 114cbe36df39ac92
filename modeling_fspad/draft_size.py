"""How much is drafted and how much of it is verified."""

from __future__ import annotations

import math
from typing import Protocol

from .candidates import Candidates


class DraftSize(Protocol):
    """Decides, for one call of `generate`, how deep a source drafts and how many nodes are verified."""

    max_candidates: int
    """Most nodes that a source needs to propose."""
    is_automatic: bool
    """Whether estimated probabilities shall be as true as can be; the reference tree takes those of the head as they are."""
    needs_scores: bool
    """Whether `wants_level` must know scores even where the host has to wait for them."""

    def begin(self) -> None:
        """A step begins: nothing is drafted yet."""

    def wants_level(self, candidates: Candidates, level: int, scores: list[float] | None) -> bool:
        """Whether a source that drafts level by level shall draft this one.

        Args:
            candidates: What other sources have proposed for this row.
            level: 0 for the children of the root.
            scores: Log-probabilities of the paths that end in the nodes to be expanded; `None` where they are not known
                on the host.
        """

    def choose(self, candidates: Candidates) -> list[int]:
        """The nodes to verify, whose ancestors are among them.

        Args:
            candidates: Everything that was proposed for this row.
        """

    def end(self, num_nodes: int, num_emitted: int, draft_seconds: float, verify_seconds: float) -> None:
        """A step has ended.

        Args:
            num_nodes: Nodes that were verified, the root included.
            num_emitted: Tokens that were emitted.
            draft_seconds: What drafting took, on the host's clock.
            verify_seconds: What verification took, likewise.
        """


class FixedSize:
    """The reference tree: always the same number of nodes, the best of all that are drafted to a fixed depth.

    Args:
        num_draft_tokens: Nodes to verify, the root not counted.
        depth: Levels that are expanded after the first.
        confidence_threshold: Stop when the best path of the last level is less probable than this; `None` for never.
    """

    is_automatic = False

    def __init__(self, num_draft_tokens: int, depth: int, confidence_threshold: float | None = None):
        self.max_candidates = num_draft_tokens
        self.needs_scores = confidence_threshold is not None
        self.depth = depth
        self.confidence_threshold = confidence_threshold

    def begin(self) -> None:
        """Nothing to do."""

    def wants_level(self, candidates: Candidates, level: int, scores: list[float] | None) -> bool:
        """Up to the depth, and the confidence threshold."""
        if level > min(self.depth, self.max_candidates - 1):
            return False
        if scores is None or self.confidence_threshold is None:
            return True
        return math.exp(max(scores)) >= self.confidence_threshold

    def choose(self, candidates: Candidates) -> list[int]:
        """The best of all (EAGLE-2, arXiv 2406.16858, section 4.2)."""
        return candidates.ranking()[: self.max_candidates]

    def end(self, num_nodes: int, num_emitted: int, draft_seconds: float, verify_seconds: float) -> None:
        """Nothing to learn."""
