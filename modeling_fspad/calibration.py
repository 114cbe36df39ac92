"""How far a head's probabilities can be trusted, by depth: what it proposed against what the target then emitted."""

from __future__ import annotations

import math
from collections.abc import Iterable

# As how many accepted drafts it counts, before any is seen, that the head's probabilities are right
_PRIOR = 4.0
_MEMORY = 64.0
_MOST = math.log(2)


class Calibration:
    """Corrects the probabilities of drafted paths by a factor for each depth.

    A head that runs on features of its own is less sure of a path the deeper it gets than it is right, and one that was
    trained for another target is surer than it is right.
    """

    def __init__(self) -> None:
        # By depth: how many drafts were accepted, and how many were expected to be. Replaced as a whole, since calls in
        # other threads read it
        self._counts: list[tuple[float, float]] = []

    def correction(self, depth: int) -> float:
        """What to add to the log-probability of a path.

        Args:
            depth: Its length, at least 1.
        """
        counts = self._counts
        if depth > len(counts):
            return 0.0
        accepted, expected = counts[depth - 1]
        ratio = (accepted + _PRIOR) / (expected + _PRIOR)
        return min(math.log(ratio), _MOST)

    def learn(self, drafted: Iterable[tuple[int, int, int, float]], emitted: list[int]) -> None:
        """Compare one draft with the tokens that the target emitted in its place.

        Nodes below the last emitted token tell nothing, as nobody knows what would have come there.

        Args:
            drafted: Index, token, parent's index (-1 for the root) and log-probability of each node, parents first.
            emitted: The tokens.
        """
        depths, true_path = {-1: 0}, {-1}
        counts = self._counts + [(0.0, 0.0)] * (len(emitted) - len(self._counts))
        expected, accepted = [0.0] * len(emitted), [0.0] * len(emitted)
        for index, token, parent, score in drafted:
            depth = depths[index] = depths[parent] + 1
            if depth > len(emitted):
                continue
            expected[depth - 1] += math.exp(score)
            if parent in true_path and token == emitted[depth - 1]:
                true_path.add(index)
                accepted[depth - 1] = 1.0
        deepest = max(depths.values())
        fade = 1 - 1 / _MEMORY
        for depth in range(min(deepest, len(emitted))):
            counts[depth] = (counts[depth][0] * fade + accepted[depth], counts[depth][1] * fade + expected[depth])
        self._counts = counts
