"""Lookup as a source of drafts: what followed the last tokens where they stood before, in the prompt or in the output."""

from __future__ import annotations

import math

from .candidates import Candidates
from .draft_size import DraftSize
from .draft_source import DraftSource, Emitted

MAX_CONTINUATION = 12
NUM_CONTINUATIONS = 2
# Before anything is observed: how probable it is that one more token after a match of n tokens is right, and as how many
# observations that counts. From SmolLM2's answers to prompts of several tasks.
PRIORS = {2: 0.35, 3: 0.55, 4: 0.7, 5: 0.8}
PRIOR_WEIGHT = 4.0
# The share of what the latest occurrence leaves that goes to the one before
EARLIER = 0.4
# Older observations fade, so that a text which begins to repeat itself is noticed
MEMORY = 64.0


class NgramIndex:
    """Where each n-gram of a text stood last. Grows with the text, in constant time a token."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}

    def extend(self, tokens: list[int]) -> None:
        """Append tokens to the text.

        Args:
            tokens: Token ids.
        """
        for token in tokens:
            # The n-grams that end before this token: now something follows them
            end = len(self.tokens)
            for n in PRIORS:
                if end >= n:
                    ends = self._ends.setdefault(tuple(self.tokens[end - n :]), [])
                    ends.append(end)
                    del ends[:-NUM_CONTINUATIONS]
            self.tokens.append(token)

    def continuations(self) -> list[tuple[int, list[int]]]:
        """What followed the longest n-gram that ends the text and stood in it before, the latest first.

        Returns:
            Pairs of n and token ids.
        """
        length = len(self.tokens)
        for n in sorted(PRIORS, reverse=True):
            if length >= n and (ends := self._ends.get(tuple(self.tokens[length - n :]))):
                return [(n, self.tokens[end : end + MAX_CONTINUATION]) for end in reversed(ends)]
        return []


class LookupSource(DraftSource):
    """Proposes continuations of earlier occurrences of the last tokens, as prompt lookup does, but into the tree.

    How far they are trusted follows from what was right so far in this call, by the length of the match.
    """

    def __init__(self) -> None:
        self._indices: list[NgramIndex] = []
        self._proposed: list[list[tuple[int, list[int]]]] = []
        self._right = {n: prior * PRIOR_WEIGHT for n, prior in PRIORS.items()}
        self._seen = dict.fromkeys(PRIORS, PRIOR_WEIGHT)

    def probability(self, n: int) -> float:
        """How probable one more token after a match of n tokens is."""
        return self._right[n] / self._seen[n]

    def extend(self, emitted: Emitted) -> None:
        """Judge what was proposed for these tokens, and add them to the index."""
        if not self._indices:
            self._indices = [NgramIndex() for _ in emitted.token_ids]
            self._proposed = [[] for _ in emitted.token_ids]
        for index, tokens, proposed in zip(self._indices, emitted.token_ids, self._proposed, strict=True):
            if proposed:
                self._judge(*proposed[0], tokens)
            index.extend(tokens)

    def propose(self, candidates: list[Candidates], size: DraftSize, max_depth: int) -> None:
        """Add the continuations as branches."""
        for row, (index, candidate) in enumerate(zip(self._indices, candidates, strict=True)):
            found = index.continuations()
            self._proposed[row] = found
            for n, continuation in found:
                self._add(candidate, n, continuation[:max_depth], is_latest=continuation is found[0][1])

    def _add(self, candidates: Candidates, n: int, continuation: list[int], is_latest: bool) -> None:
        right = self.probability(n)
        node, score, has_parted = 0, 0.0, is_latest
        for token in continuation:
            known = candidates.find(node, token)
            if known is not None and not has_parted:
                node, score = known, candidates.scores[known]
                continue
            # Where an earlier occurrence went on in another way, it is left with what the latest one is not
            score += math.log(right if has_parted else EARLIER * (1 - right))
            node, has_parted = candidates.add(node, token, score), True

    def _judge(self, n: int, continuation: list[int], tokens: list[int]) -> None:
        fade = 1 - 1 / MEMORY
        for proposed, token in zip(continuation, tokens, strict=False):
            self._right[n] = self._right[n] * fade + (proposed == token)
            self._seen[n] = self._seen[n] * fade + 1
            if proposed != token:
                break
