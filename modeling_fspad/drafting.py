"""Drafting: the sources propose, the best candidates become the tree that is verified."""

from __future__ import annotations

import torch

from .candidates import Candidates
from .draft_size import DraftSize
from .draft_source import DraftSource, Emitted
from .tree import DraftTree


class Drafter:
    """Drafts trees for one call of `generate`.

    Args:
        sources: Who proposes, the cheapest first.
        size: How much is drafted and verified.
        is_chain: Whether the target can only verify one draft after the other.
    """

    def __init__(self, sources: list[DraftSource], size: DraftSize, is_chain: bool = False):
        self.sources = sources
        self.size = size
        self.is_chain = is_chain

    def extend(self, emitted: Emitted) -> None:
        """Show the sources what the target has emitted.

        Args:
            emitted: Tokens and features.
        """
        self._roots = [tokens[-1] for tokens in emitted.token_ids]
        for source in self.sources:
            source.extend(emitted)

    def draft(self, max_depth: int, device: torch.device) -> DraftTree:
        """Draft a tree that continues the last emitted token.

        Args:
            max_depth: Levels that may still be of use, e.g. because few tokens may still be generated.
            device: Where the tree is wanted.
        """
        self.size.begin()
        if max_depth <= 0:
            return DraftTree.root_only(self._roots, device)
        candidates = [Candidates(root) for root in self._roots]
        for source in self.sources:
            source.propose(candidates, self.size, max_depth)
        if self.is_chain:
            candidates = [row.only(row.best_path()) for row in candidates]
        rows = [row.select(self.size.choose(row)) for row in candidates]
        return DraftTree([tokens for tokens, _ in rows], [parents for _, parents in rows], device)
