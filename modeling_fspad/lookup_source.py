"""Lookup as a source of drafts: what followed the last tokens where they stood before, in the prompt or in the output."""

from __future__ import annotations

import math

from .candidates import Candidates
from .draft_size import DraftSize
from .draft_source import DraftSource, Emitted

# Tokens that are looked up, and how many of them are proposed
SHORTEST, LONGEST = 1, 5
MAX_CONTINUATION = 12
NUM_CONTINUATIONS = 2
# Before anything is observed: how probable it is that one more token after a match of at least n tokens is right, and as
# how many observations that counts. From SmolLM2's answers to prompts of several tasks.
PRIORS = {1: 0.2, 2: 0.5, 3: 0.57, 4: 0.65, 5: 0.75, 8: 0.85, 16: 0.93, 32: 0.96}
PRIOR_WEIGHT = 4.0
# Nothing is ever sure, whatever was seen
LEAST_TRUST, MOST_TRUST = 0.005, 0.995
# As how many observations all those of earlier calls count: texts differ
CARRIED_WEIGHT = 8.0
# The share of what the latest occurrence leaves that goes to the one before
EARLIER = 0.4
# Older observations fade, so that a text which begins to repeat itself is noticed
MEMORY = 64.0
# The key of `PRIORS` for each length of a match
_CLASSES = [max((known for known in PRIORS if known <= n), default=SHORTEST) for n in range(max(PRIORS) + 1)]


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
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                ends = self._ends.setdefault(tuple(self.tokens[end - n :]), [])
                ends.append(end)
                del ends[:-NUM_CONTINUATIONS]
            self.tokens.append(token)

    def continuations(self) -> list[tuple[int, list[int]]]:
        """What followed the longest n-gram that ends the text and stood in it before, the latest first.

        Returns:
            Pairs of the length of the match, of at most the longest of `PRIORS`, and token ids.
        """
        length = len(self.tokens)
        for n in range(min(LONGEST, length), SHORTEST - 1, -1):
            if ends := self._ends.get(tuple(self.tokens[length - n :])):
                return [(self._matched(end, n), self.tokens[end : end + MAX_CONTINUATION]) for end in reversed(ends)]
        return []

    def _matched(self, end: int, n: int) -> int:
        """How many tokens before `end` are the last ones of the text."""
        tokens, last = self.tokens, len(self.tokens)
        if n == LONGEST:
            while n < max(PRIORS) and n < end and tokens[end - n - 1] == tokens[last - n - 1]:
                n += 1
        return n


class LookupTrust:
    """How far continuations of matches can be trusted: what was right so far, by the length of the match.

    A text that is drawn repeats itself less than one of most probable tokens.
    """

    def __init__(self) -> None:
        # How many continuations were right, and how many were seen
        self._counts = {n: (prior * PRIOR_WEIGHT, PRIOR_WEIGHT) for n, prior in PRIORS.items()}

    def begin(self) -> None:
        """A call begins, with another text."""
        for n, (right, seen) in self._counts.items():
            kept = min(1.0, CARRIED_WEIGHT / seen)
            self._counts[n] = right * kept, seen * kept

    def probability(self, n: int) -> float:
        """How probable the token after a match of n tokens is."""
        right, seen = self._counts[_class(n)]
        return min(max(right / seen, LEAST_TRUST), MOST_TRUST)

    def learn(self, n: int, is_right: bool) -> None:
        """Take in whether the token after a match of n tokens was right."""
        right, seen = self._counts[_class(n)]
        fade = 1 - 1 / MEMORY
        self._counts[_class(n)] = right * fade + is_right, seen * fade + 1


def _class(n: int) -> int:
    return _CLASSES[min(n, len(_CLASSES) - 1)]


class LookupSource(DraftSource):
    """Proposes continuations of earlier occurrences of the last tokens, as prompt lookup does, but into the tree.

    A draft that is right makes the match longer by one token, so that drafts are trusted more the further they are right.

    Args:
        trust: How far they are trusted, and what learns that; by default nothing was seen yet.
    """

    def __init__(self, trust: LookupTrust | None = None) -> None:
        self.trust = LookupTrust() if trust is None else trust
        self.trust.begin()
        self._indices: list[NgramIndex] = []
        self._proposed: list[list[tuple[int, list[int]]]] = []

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
            self._proposed[row] = index.continuations()
            for rank, (n, continuation) in enumerate(self._proposed[row]):
                self._add(candidate, n, continuation[:max_depth], is_latest=rank == 0)

    def _add(self, candidates: Candidates, n: int, continuation: list[int], is_latest: bool) -> None:
        node, score, has_parted = 0, 0.0, is_latest
        for offset, token in enumerate(continuation):
            known = candidates.find(node, token)
            if known is not None and not has_parted:
                node, score = known, candidates.scores[known]
                continue
            right = self.trust.probability(n + offset)
            # Where an earlier occurrence went on in another way, it is left with what the latest one is not
            score += math.log(right if has_parted else EARLIER * (1 - right))
            node, has_parted = candidates.add(node, token, score), True

    def _judge(self, n: int, continuation: list[int], tokens: list[int]) -> None:
        for offset, (proposed, token) in enumerate(zip(continuation, tokens, strict=False)):
            self.trust.learn(n + offset, proposed == token)
            if proposed != token:
                break
