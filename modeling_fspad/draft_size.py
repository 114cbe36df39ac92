"""How much is drafted and how much of it is verified."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, Protocol

from transformers import GenerationConfig

from .candidates import Candidates

if TYPE_CHECKING:
    from .configuration_fspad import FSPADConfig


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


def drafting_options(
    config: FSPADConfig, generation_config: GenerationConfig
) -> tuple[int | Literal["auto"], float | None]:
    """How much to draft in one call.

    `generate(num_assistant_tokens=..., assistant_confidence_threshold=...)` overrule the head's configuration. The
    values that transformers fills in by itself (20 and 0.4) cannot be told from an omission and count as one.

    Args:
        config: The head's configuration.
        generation_config: The options of `generate`.

    Returns:
        The number of tokens to verify, or `"auto"`, and the confidence below which drafting ends early.

    Raises:
        ValueError: If `num_assistant_tokens` is no positive integer.
    """
    filled_in = generation_config._get_default_generation_params()

    def given(name: str) -> Any:
        value = getattr(generation_config, name, None)
        return None if value == filled_in.get(name) else value

    num_draft_tokens = given("num_assistant_tokens")
    if num_draft_tokens is None:
        num_draft_tokens = config.num_draft_tokens
    elif not isinstance(num_draft_tokens, int) or num_draft_tokens < 1:
        raise ValueError(
            f"num_assistant_tokens must be a positive integer, got {num_draft_tokens!r}: raise or drop it."
        )
    return num_draft_tokens, given("assistant_confidence_threshold")
