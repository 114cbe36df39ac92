"""Candidates: what the draft sources propose for one row, merged into one tree, of which the best nodes are verified."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .agreement import Agreement

# Probability that a source leaves to tokens it does not name, at least: rounding must not divide by zero
_LEAST_LEFT = 0.01


class Candidates:
    """Proposed continuations of one row. Node 0 is the root, the last token already emitted, which is certain.

    The score of a node is the logarithm of its estimated probability that the target accepts it and all its ancestors. Of
    equal (parent, token) pairs that are added the larger score counts; those that are pooled share one.

    Args:
        root_token: The last emitted token.
    """

    def __init__(self, root_token: int):
        self.tokens = [root_token]
        self.parents = [0]
        self.scores = [0.0]
        self._nodes: dict[tuple[int, int], int] = {}
        self._children: list[list[int]] = [[]]

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
            self._children.append([])
            self._children[parent].append(node)
        elif score > self.scores[node]:
            self.scores[node] = score
        return node

    def find(self, parent: int, token: int) -> int | None:
        """The child of a node that carries a token, if it was proposed."""
        return self._nodes.get((parent, token))

    def pool(
        self, parent: int, probabilities: dict[int, float], agreement: Agreement
    ) -> list[tuple[int, float, float]]:
        """Propose children of a node of which others may have been proposed before.

        What is said of one token by both is pooled. The others share what the pool leaves, so that the probabilities of a
        node's children never add up to more than its own.

        Args:
            parent: Index of their parent.
            probabilities: Tokens, and how probable each is after the parent.
            agreement: Pools.

        Returns:
            For each child that was there before: its token, its probability before, and what was said of it now.
        """
        score = self.scores[parent]
        known = [node for node in self._children[parent] if self.scores[node] > -math.inf]
        before = [math.exp(self.scores[node] - score) for node in known]
        said = [probabilities.get(self.tokens[node], 0.0) for node in known]
        pooled = [agreement.probability(*both) for both in zip(before, said, strict=True)]
        too_much = max(1.0, sum(pooled))
        for node, probability in zip(known, pooled, strict=True):
            self._rescore(node, score + math.log(probability / too_much))
        # What is left for the others, by what they had among themselves
        share = max(0.0, 1 - sum(pooled) / too_much) / max(1 - sum(said), _LEAST_LEFT) if known else 1.0
        for token, probability in probabilities.items():
            if (parent, token) not in self._nodes:
                left = min(1.0, share * probability)
                self.add(parent, token, score + math.log(left) if left else -math.inf)
        return [(self.tokens[node], *both) for node, both in zip(known, zip(before, said, strict=True), strict=True)]

    def _rescore(self, node: int, score: float) -> None:
        """Give a node another score, and its descendants theirs."""
        change = score - self.scores[node]
        descendants = [node]
        for one in descendants:
            self.scores[one] += change
            descendants += self._children[one]

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
