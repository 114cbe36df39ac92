"""What a step costs on this machine: the time of a verification by its number of nodes, and of drafting by its levels."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .verification_mode import VerificationMode

# Nodes, the root included, that the first steps verify to learn what that costs: they are real steps, nothing is wasted
TRIALS = (16, 1, 4, 32, 8) * 2
# Weight of a later observation: for sizes near to it, and for all
_LOCAL, _GLOBAL = 0.15, 0.05
# Sizes that differ by a larger factor have times of their own
_APART = 2

_lock = threading.Lock()
_known: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple, StepCosts]] = weakref.WeakKeyDictionary()


class StepCosts:
    """Times of steps, from the first steps of a target and corrected by all later ones.

    So they follow the machine and the length of the context.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}  # by number of nodes
        self._num_trials = 0
        self._first_level: float | None = None
        self._further_level: float | None = None

    @property
    def trial(self) -> int | None:
        """The number of nodes that the next step shall verify, if it can, for its time to be known; `None` for any."""
        return TRIALS[self._num_trials] if self._num_trials < len(TRIALS) else None

    def verify(self, num_nodes: int) -> float:
        """Seconds of a verification, interpolated between known sizes, and extrapolated beyond them.

        Args:
            num_nodes: Nodes of the tree, the root included; 1 is a plain step.
        """
        return self.verify_all(num_nodes)[-1]

    def verify_all(self, most: int) -> list[float]:
        """Seconds of verifications of 1 to `most` nodes."""
        sizes = sorted(self._seconds)
        if len(sizes) < 2:  # nothing is decided yet
            return [self._seconds[sizes[0]] if sizes else 1.0] * most
        # What disturbs a measurement makes it longer: fewer nodes never cost more
        times = [min(self._seconds[size] for size in sizes[place:]) for place in range(len(sizes))]
        result, low = [], 0
        for num_nodes in range(1, most + 1):
            while low + 2 < len(sizes) and num_nodes > sizes[low + 1]:
                low += 1
            slope = (times[low + 1] - times[low]) / (sizes[low + 1] - sizes[low])
            result.append(times[low] + slope * max(0, num_nodes - sizes[low]))
        return result

    def draft(self, num_levels: int) -> float:
        """Seconds of drafting so many levels with the head; before any was seen, a tenth of a plain step each.

        Args:
            num_levels: Levels, of which the first takes in what was emitted before.
        """
        first = self.verify(1) / 10 if self._first_level is None else self._first_level
        further = first if self._further_level is None else self._further_level
        return first + further * (num_levels - 1) if num_levels else 0.0

    def observe_verify(self, num_nodes: int, seconds: float) -> None:
        """Take in the time of a real verification.

        Args:
            num_nodes: Its nodes.
            seconds: Its time.
        """
        if self.trial is not None:
            self._num_trials += 1
            self._seconds[num_nodes] = min(seconds, self._seconds.get(num_nodes, seconds))
            return
        expected = self.verify(num_nodes)
        ratio = min(max(seconds / expected, 0.5), 2.0)  # one hiccup of the machine must not change much
        sizes = list(self._seconds)
        nearest = min(sizes, key=lambda size: abs(size - num_nodes))
        for size in sizes:
            self._seconds[size] *= 1 + (_GLOBAL + _LOCAL * (size == nearest)) * (ratio - 1)
        if not nearest <= _APART * num_nodes <= _APART**2 * nearest:  # a size that no trial came near to
            self._seconds[num_nodes] = ratio * expected

    def observe_draft(self, num_levels: int, seconds: float) -> None:
        """Take in the time of real drafting.

        Args:
            num_levels: Its levels.
            seconds: Its time.
        """
        if self._first_level is None or self.trial is not None:
            # The least, as kernels that are loaded when they are first needed make the first drafts take many times as long
            per_level = seconds / num_levels
            self._first_level = self._further_level = min(per_level, self._first_level or per_level)
            return
        # Towards the line through all that was seen, by normalised least mean squares
        error = min(seconds, 2 * self.draft(num_levels)) - self.draft(num_levels)
        step = _LOCAL * error / (1 + (num_levels - 1) ** 2)
        self._first_level = max(0.0, self._first_level + step)
        self._further_level = max(0.0, self._further_level + step * (num_levels - 1))


def costs_of(target: PreTrainedModel, mode: VerificationMode) -> StepCosts:
    """What steps of a target cost, as far as calls of this process have seen. Kept in memory as long as the target lives.

    Args:
        target: The model that verifies.
        mode: How it verifies.
    """
    key = (target.dtype, target.device, target.config._attn_implementation, mode)
    with _lock:
        return _known.setdefault(target, {}).setdefault(key, StepCosts())
