"""The nodes that a head has drafted in one step, and how they are proposed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .agreement import Agreement
    from .calibration import Calibration
    from .candidates import Candidates

# Index, token, parent's index (-1 for the root) and logarithm of the probability of the path
Node = tuple[int, int, int, float]
# A token that others had proposed, how probable it was by them, and how probable the head finds it
Opinions = tuple[int, float, float]


@dataclass
class DraftedNodes:
    """All nodes that were drafted, level by level. Indices count them; the root is not among them and has index -1."""

    tokens: list[torch.LongTensor] = field(default_factory=list)  # (batch, nodes) each, as all of these
    parents: list[torch.LongTensor] = field(default_factory=list)
    scores: list[torch.FloatTensor] = field(default_factory=list)

    def add_level(self, tokens: torch.LongTensor, parents: torch.LongTensor, scores: torch.FloatTensor) -> int:
        """Add a level, and return the index of its first node."""
        first = sum(level.shape[1] for level in self.tokens)
        self.tokens.append(tokens)
        self.parents.append(parents)
        # A head that writes NaN drafts badly, but it must not break the tree
        self.scores.append(scores.nan_to_num(nan=-torch.inf))
        return first

    def best(self, num_nodes: int) -> list[list[Node]]:
        """Index, token, parent and score of the best nodes of each row, in the order they were drafted in.

        Of equal scores the stable sort takes the earlier node, which is the parent: so the ancestors of each are there.
        """
        tokens, parents, scores = (torch.cat(levels, dim=1) for levels in (self.tokens, self.parents, self.scores))
        ranking = scores.sort(dim=1, descending=True, stable=True).indices
        kept = ranking[:, :num_nodes].sort(dim=1).values  # (batch, kept)
        # In one piece, since each look at a tensor makes an accelerator wait
        table = torch.stack([kept, tokens.gather(1, kept), parents.gather(1, kept)]).double()
        table = torch.cat([table, scores.gather(1, kept).double()[None]]).permute(1, 2, 0).tolist()
        return [[(int(i), int(token), int(parent), score) for i, token, parent, score in row] for row in table]

    def can_improve(self, scores: torch.Tensor, num_kept: int) -> bool:
        """Whether descendants of nodes with these scores could be among the best of all: none scores above its ancestor.

        Args:
            scores: Of the nodes that would be expanded, of shape `(batch, width)`.
            num_kept: How many are kept of all nodes.
        """
        if sum(level.shape[1] for level in self.scores) < num_kept:
            return True
        worst_kept = torch.cat(self.scores, dim=1).topk(num_kept, dim=1).values[:, -1]
        return bool((scores.amax(dim=1) > worst_kept).any())


def propose_nodes(
    candidates: Candidates, drafted: list[Node], calibration: Calibration | None, agreement: Agreement
) -> list[Opinions]:
    """Propose drafted nodes, pooled with what others have proposed.

    Args:
        candidates: What others have proposed for this row.
        drafted: The nodes, parents first.
        calibration: Corrects their probabilities; `None` takes them as they are.
        agreement: Pools.

    Returns:
        What others and the head say of the children of the root that others had proposed.
    """
    numbers, depths, scores = {-1: 0}, {-1: 0}, {-1: 0.0}
    children: dict[int, dict[int, int]] = {}
    for index, token, parent, score in drafted:
        depth = depths[index] = depths[parent] + 1
        scores[index] = score + (calibration.correction(depth) if calibration else 0.0)
        children.setdefault(parent, {})[token] = index
    opinions: list[Opinions] = []
    for parent, tokens in children.items():
        probabilities = {
            token: math.exp(min(0.0, scores[index] - scores[parent])) if scores[index] > -math.inf else 0.0
            for token, index in tokens.items()
        }
        pooled = candidates.pool(numbers[parent], probabilities, agreement)
        if parent == -1:
            opinions = pooled
        numbers |= {index: candidates.find(numbers[parent], token) for token, index in tokens.items()}
    return opinions
