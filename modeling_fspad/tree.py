"""The draft tree: which drafted tokens are verified, and who descends from whom. Built on the host, uploaded in one piece."""

from __future__ import annotations

import functools

import torch


class DraftTree:
    """Tokens to verify in one forward pass of the target. Node 0 is the root: the last token already emitted.

    A parent always stands before its children. All rows of a batch have the same number of nodes.

    Args:
        tokens: Token ids of each row, of shape `(batch, nodes)`.
        parents: Index of each node's parent, 0 for the root itself, of the same shape.
        device: Where the tensors are wanted.
    """

    def __init__(self, tokens: list[list[int]], parents: list[list[int]], device: torch.device | str = "cpu"):
        self.token_lists = tokens
        self.parent_lists = parents
        self.device = torch.device(device)

    @classmethod
    def root_only(cls, tokens: list[int], device: torch.device | str = "cpu") -> DraftTree:
        """A tree without drafts.

        Args:
            tokens: The last token of each row.
            device: Where the tensors are wanted.
        """
        return cls([[token] for token in tokens], [[0] for _ in tokens], device)

    @property
    def num_nodes(self) -> int:
        """Nodes of the tree, the root included."""
        return len(self.token_lists[0])

    @property
    def tokens(self) -> torch.LongTensor:
        """Token ids, of shape `(batch, nodes)`."""
        return self._tensors[:, 0]

    @property
    def parents(self) -> torch.LongTensor:
        """Index of each node's parent, of shape `(batch, nodes)`."""
        return self._tensors[:, 1]

    @property
    def depths(self) -> torch.LongTensor:
        """Distance of each node from the root, of shape `(batch, nodes)`."""
        return self._tensors[:, 2]

    @functools.cached_property
    def ancestors(self) -> torch.BoolTensor:
        """Of shape `(batch, nodes, nodes)`: whether node m (last) is node n or an ancestor of it."""
        return self._tensors[:, 3:].bool()

    @functools.cached_property
    def _tensors(self) -> torch.LongTensor:
        """Everything in one tensor, of shape `(batch, 3 + nodes, nodes)`, since each upload makes an accelerator wait."""
        rows = []
        for tokens, parents in zip(self.token_lists, self.parent_lists, strict=True):
            ancestors: list[list[int]] = []
            for node, parent in enumerate(parents):
                line = list(ancestors[parent]) if node else [0] * len(parents)
                line[node] = 1
                ancestors.append(line)
            depths = [sum(line) - 1 for line in ancestors]
            rows.append([tokens, parents, depths, *ancestors])
        return torch.tensor(rows, device="cpu").to(self.device)
