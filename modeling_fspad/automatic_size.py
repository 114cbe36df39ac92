"""The draft that fits the machine: as much is drafted and verified as makes most tokens a second.

With R the tokens per second so far, a step that emits E tokens in T seconds is worth E - R T: over a whole answer the rate is
highest when every step is worth most (fractional programming; compare OPT-Tree, arXiv 2406.17276, and Sequoia, arXiv
2402.12374, which size trees by other measures). So

- of candidates with probabilities p_1 >= p_2 >= ... the first n are verified for which `p_1 + ... + p_n - R verify(n + 1)` is
  largest; with n = 0 the step is a plain one,
- a level is drafted while what it can add is more than `R level`,
- and the head is asked at all if that was worth its time lately. If it was not, it is asked again now and then.
"""

from __future__ import annotations

import math

from .candidates import Candidates
from .experience import Experience
from .step_costs import StepCosts

MAX_CANDIDATES = 48
# How much of the probability of the nodes that are expanded their children are expected to keep, before any are seen
_KEPT = 0.6
# Weight of a new observation
_KEEPS = 0.06
# Tokens that asking the head must bring beyond its time: no estimate is better than that
_MARGIN = 0.05


class AutomaticSize:
    """Sizes the drafts of one call of `generate`.

    Args:
        costs: What steps cost.
        experience: What earlier calls have learned.
        depth: Levels that may be expanded after the first.
        confidence_threshold: Stop when the best path of the last level is less probable than this; `None` for never.
    """

    is_automatic = True

    def __init__(
        self, costs: StepCosts, experience: Experience, depth: int, confidence_threshold: float | None = None
    ):
        self.needs_scores = confidence_threshold is not None
        self.confidence_threshold = confidence_threshold
        self.max_candidates = MAX_CANDIDATES
        self.costs = costs
        self.experience = experience
        self.depth = depth
        self.kept = _KEPT
        self._has_drafted = False
        experience.begin_answer()
        self.begin()

    def begin(self) -> None:
        """Nothing is drafted yet."""
        self._levels = 0
        self._without_head: list[int] | None = None
        self._mass: float | None = None
        self._promise: float | None = None

    def wants_level(self, candidates: Candidates, level: int, scores: list[float] | None) -> bool:
        """Whether what a level can add is worth its time."""
        is_unsure = self.needs_scores and scores and math.exp(max(scores)) < self.confidence_threshold
        if level > self.depth or is_unsure:
            return False
        if self.costs.trial is not None:
            wants = self.costs.trial > 1
        elif level == 0:
            wants = self._wants_head(candidates)
        else:
            wants = self._expected_mass(level, scores) * self.kept > self.rate * self._level_time()
        self._levels += wants
        return wants

    def choose(self, candidates: Candidates) -> list[int]:
        """The nodes that make the step worth most."""
        ranking = candidates.ranking()
        if self.costs.trial is not None:
            return ranking[: self.costs.trial - 1]
        reliability = 1.0 if self._without_head is None else self.experience.reliability
        num_nodes, worth = self._best(candidates, ranking, reliability)
        if self._without_head is not None:
            self._promise = candidates.expected_tokens(ranking[:num_nodes])[-1]
            # What would have been verified without it, by what is known now
            without = 1 + reliability * self._before.expected_tokens(self._without_head)[-1]
            without -= self.rate * self.costs.verify(len(self._without_head) + 1)
            cost = self.rate * self.costs.draft(self._levels) + _MARGIN
            self.experience.observe_head(self._has_others, worth - without - cost)
        return ranking[:num_nodes]

    def end(self, num_nodes: int, num_emitted: int, draft_seconds: float, verify_seconds: float) -> None:
        """Learn from the times of the step."""
        # Not of the first draft, for which the head takes in the whole prompt
        if self._levels and self._has_drafted:
            self.costs.observe_draft(self._levels, draft_seconds)
        self._has_drafted |= self._levels > 0
        if self._promise:
            self.experience.observe_promise(self._promise, num_emitted - 1)
        self.costs.observe_verify(num_nodes, verify_seconds)
        if self.costs.trial is None:
            self.experience.observe_step(num_emitted, self.costs.verify(num_nodes) + self.costs.draft(self._levels))

    @property
    def rate(self) -> float:
        """Tokens per second of late; not below those of plain decoding, to which every step could return."""
        return max(self.experience.rate, 1 / self.costs.verify(1))

    def _wants_head(self, candidates: Candidates) -> bool:
        ranking = candidates.ranking()
        without_head = ranking[: self._best(candidates, ranking)[0]]
        self._has_others = bool(ranking) and candidates.scores[ranking[0]] > math.log(0.5)
        if not self.experience.wants_head(self._has_others):
            return False
        # A chain is chosen of other candidates, which hold one path of these
        self._without_head, self._before = without_head, candidates
        return True

    def _expected_mass(self, level: int, scores: list[float] | None) -> float:
        """The expected number of accepted drafts among the nodes that a level expands."""
        if scores is None:  # on an accelerator, a look at them would cost more than a level
            return self.kept ** (level - 1)
        # Nodes that will not be verified are of no use, nor are their children
        step = self.costs.verify(9) - self.costs.verify(8)
        mass = sum(p for p in map(math.exp, scores) if p > self.rate * step)
        if self._mass:
            self.kept += _KEEPS * (min(mass / self._mass, 1.0) - self.kept)
        self._mass = mass
        return mass

    def _level_time(self) -> float:
        return self.costs.draft(2) - self.costs.draft(1)

    def _best(self, candidates: Candidates, ranking: list[int], reliability: float = 1.0) -> tuple[int, float]:
        """How many of the best nodes to verify, and what the step is then worth."""
        expected = candidates.expected_tokens(ranking)
        times, rate = self.costs.verify_all(len(expected)), self.rate
        worth = [1 + reliability * tokens - rate * time for tokens, time in zip(expected, times, strict=True)]
        best = max(range(len(worth)), key=worth.__getitem__)
        return best, worth[best]
