"""Candidates: what the draft sources propose for one row, merged into one tree, of which the best nodes are verified."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate


class Candidates:
    """Proposed continuations of one row. Node 0 is the root, the last token already emitted, which is certain.

    The score of a node is the logarithm of its estimated probability that the target accepts it and all its ancestors. Of
    equal (parent, token) pairs the larger score counts.

    Args:
        root_token: The last emitted token.
    """

    def __init__(self, root_token: int):
        self.tokens = [root_token]
        self.parents = [0]
        self.scores = [0.0]
        self._nodes: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int, score: float) -> int:
        """Propose a node.

        Args:
            parent: Index of its parent.
            token: Its token id.
            score: Logarithm of the probability of its whole path. No child is more probable than its parent: a larger
                score is cut, and NaN counts as impossible.

        Returns:
            Index of the node, which may have been there already.
        """
        score = min(score, self.scores[parent]) if score == score else -math.inf
        node = self._nodes.setdefault((parent, token), len(self.tokens))
        if node == len(self.tokens):
            self.tokens.append(token)
            self.parents.append(parent)
            self.scores.append(score)
        elif score > self.scores[node]:
            self.scores[node] = score
        return node

    def find(self, parent: int, token: int) -> int | None:
        """The child of a node that carries a token, if it was proposed."""
        return self._nodes.get((parent, token))

    def ranking(self) -> list[int]:
        """All proposed nodes, the most probable first.

        Of equal scores the earlier node comes first, and a parent is earlier than its children: so the ancestors of the
        first n nodes are always among them.
        """
        return sorted(range(1, len(self.scores)), key=lambda node: -self.scores[node])

    def best_path(self) -> list[int]:
        """The path, from the root down, on which most tokens are expected to be accepted: for targets that verify a chain."""
        gains, best_child = [0.0] * len(self), [0] * len(self)
        for node in range(len(self) - 1, 0, -1):
            gain = math.exp(self.scores[node]) + gains[node]
            parent = self.parents[node]
            if best_child[parent] == 0 or gain > gains[parent]:
                gains[parent], best_child[parent] = gain, node
        path, node = [], 0
        while node := best_child[node]:
            path.append(node)
        return path

    def only(self, path: list[int]) -> Candidates:
        """These candidates without any but those of one path.

        Args:
            path: Nodes from a child of the root down.
        """
        chain, node = Candidates(self.tokens[0]), 0
        for index in path:
            node = chain.add(node, self.tokens[index], self.scores[index])
        return chain

    def expected_tokens(self, ranking: Sequence[int]) -> list[float]:
        """How many drafts would be accepted, if the first n of a ranking were verified, for n = 0, 1, 2, ..."""
        return list(accumulate((math.exp(self.scores[node]) for node in ranking), initial=0.0))

    def select(self, nodes: Sequence[int]) -> tuple[list[int], list[int]]:
        """Tokens and parents of the root and of some nodes, which are numbered anew, in the order they were proposed in.

        Args:
            nodes: Indices of nodes whose ancestors are among them.

        Returns:
            Token ids and parents' indices of a [`~fspad.tree.DraftTree`].
        """
        kept = [0, *sorted(nodes)]
        numbers = {node: number for number, node in enumerate(kept)}
        return [self.tokens[node] for node in kept], [numbers[self.parents[node]] for node in kept]
