"""The draft tree: which of the drafted tokens are verified, and who descends from whom. Tensors only, all batched."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class DraftTree:
    """Tokens to verify in one forward pass of the target. Node 0 is the root: the last token already emitted.

    Nodes are ordered by level, and a parent always stands before its children.

    Args:
        tokens: Token ids, of shape `(batch, nodes)`.
        parents: Index of each node's parent, of shape `(batch, nodes)`; 0 for the root itself.
        ancestors: `ancestors[b, n, m]` tells whether m is n or an ancestor of n; bool, of shape `(batch, nodes, nodes)`.
    """

    tokens: torch.LongTensor
    parents: torch.LongTensor
    ancestors: torch.BoolTensor

    @classmethod
    def root_only(cls, tokens: torch.LongTensor) -> DraftTree:
        """A tree without drafts.

        Args:
            tokens: The last token of each row, of shape `(batch, 1)`.
        """
        return cls(tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool)[..., None])

    def to(self, device: torch.device) -> DraftTree:
        """The same tree on another device."""
        return DraftTree(self.tokens.to(device), self.parents.to(device), self.ancestors.to(device))

    @property
    def num_nodes(self) -> int:
        """Nodes of the tree, the root included."""
        return self.tokens.shape[1]

    @property
    def depths(self) -> torch.LongTensor:
        """Distance of each node from the root, of shape `(batch, nodes)`."""
        return self.ancestors.sum(-1) - 1


@dataclass
class DraftedNodes:
    """All nodes that a head has drafted, level by level, before the best of them become a [`DraftTree`].

    Indices count drafted nodes in the order in which they were added; the root is not among them and has index -1.
    """

    tokens: list[torch.LongTensor] = field(default_factory=list)
    parents: list[torch.LongTensor] = field(default_factory=list)
    scores: list[torch.FloatTensor] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(level.shape[1] for level in self.tokens)

    def add_level(self, tokens: torch.LongTensor, parents: torch.LongTensor, scores: torch.FloatTensor) -> int:
        """Add the nodes of one level.

        Args:
            tokens: Token ids, of shape `(batch, nodes)`.
            parents: Index of each node's parent among all drafted nodes, -1 for the root, of shape `(batch, nodes)`.
            scores: Cumulative log-probabilities, of shape `(batch, nodes)`.

        Returns:
            The index of the level's first node.
        """
        first = len(self)
        self.tokens.append(tokens)
        self.parents.append(parents)
        # A head that writes NaN drafts badly, but it must not break the tree
        self.scores.append(scores.nan_to_num(nan=-torch.inf))
        return first

    def can_improve(self, scores: torch.FloatTensor, num_draft_tokens: int) -> bool:
        """Whether descendants of some nodes could be among the best of all, so that drafting on is of use.

        No descendant scores above its ancestor, and of equal scores the earlier node is kept.

        Args:
            scores: Cumulative log-probabilities of the nodes, of shape `(batch, nodes)`.
            num_draft_tokens: How many nodes are kept in the end.
        """
        if len(self) < num_draft_tokens:
            return True
        worst_kept = torch.cat(self.scores, dim=1).topk(num_draft_tokens, dim=1).values[:, -1]
        return bool((scores.amax(dim=1) > worst_kept).any())

    def best_tree(self, root_tokens: torch.LongTensor, num_draft_tokens: int) -> DraftTree:
        """Re-rank all drafted nodes and keep the best (EAGLE-2, arXiv 2406.16858, section 4.2).

        A child never scores above its parent, and of equal scores the stable sort takes the earlier node, which is the
        parent: so the ancestors of every kept node are kept too.

        Args:
            root_tokens: The last emitted tokens, of shape `(batch, 1)`.
            num_draft_tokens: How many nodes to keep, the root not counted.

        Returns:
            The tree of the best nodes.
        """
        if not self.tokens:
            return DraftTree.root_only(root_tokens)
        tokens, parents, scores = (torch.cat(levels, dim=1) for levels in (self.tokens, self.parents, self.scores))
        ranking = scores.sort(dim=1, descending=True, stable=True).indices
        kept = ranking[:, :num_draft_tokens].sort(dim=1).values  # (batch, kept)

        # The root's index -1 is found before every kept node, hence at 0 after the shift
        kept_parents = parents.gather(1, kept)
        new_parents = torch.searchsorted(kept, kept_parents) + (kept_parents >= 0)
        root = torch.zeros_like(root_tokens)
        tree_parents = torch.cat([root, new_parents], dim=1)
        return DraftTree(
            tokens=torch.cat([root_tokens, tokens.gather(1, kept)], dim=1),
            parents=tree_parents,
            ancestors=_ancestors(tree_parents, num_levels=len(self.tokens)),
        )


def _ancestors(parents: torch.LongTensor, num_levels: int) -> torch.BoolTensor:
    """Each node's own index and those of its ancestors, as a mask of shape `(batch, nodes, nodes)`."""
    batch, num_nodes = parents.shape
    own = torch.eye(num_nodes, dtype=torch.bool, device=parents.device).expand(batch, -1, -1)
    index = parents[..., None].expand(-1, -1, num_nodes)
    ancestors = own
    for _ in range(num_levels):
        ancestors = own | ancestors.gather(1, index)
    return ancestors
