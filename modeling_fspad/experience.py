"""What calls with one head and one target learn from one another, beside what steps cost.

Kept in memory as long as both live, never on disk. It decides how much is drafted, and so how fast a call begins, never
what it returns.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

from .agreement import Agreement
from .calibration import Calibration
from .lookup_source import LookupTrust

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .modeling_fspad import FSPADModel

# Weight of a new observation: the rate is that of many steps, as answers come in bursts
_RATE = 0.03
# Of what the head was worth, where others had a good draft already and where they had none. Without it the step is then a
# plain one, so that it takes many bad ones to believe that the head is of no use
_WORTH = {True: 0.15, False: 0.03}
_FIRST_WORTH = {True: 0.0, False: 0.15}
# What it is worth at least when an answer begins: the last text may have been one that it drafts badly
_NEW_TEXT_WORTH = {True: 0.0, False: 0.03}
# Of how many drafts of the head were accepted, beside how many were expected
_KEPT_PROMISE = 0.02
# As which it counts at least when an answer begins
_LEAST_RELIABILITY = 0.5
# Most steps between two looks at a head that was not worth its time
_LONGEST_PAUSE = 32

_lock = threading.Lock()
_known: weakref.WeakKeyDictionary[FSPADModel, weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple, Experience]]] = (
    weakref.WeakKeyDictionary()
)


class Experience:
    """What was learned so far. Calls that run at once share it: an observation may get lost between them, no more."""

    def __init__(self) -> None:
        self.calibration = Calibration()
        self.agreement = Agreement()
        self.lookup_trust = LookupTrust()
        # Of the last steps, as averages that start with nothing: only their ratio counts
        self._tokens, self._seconds = 0.0, 0.0
        # What asking the head has been worth, in tokens: where others had a good draft already, and where they had none
        self._worth = dict(_FIRST_WORTH)
        self._pause = {False: 0, True: 0}
        self._next_pause = {False: 1, True: 1}
        self._promised = self._accepted = 1.0

    def begin_answer(self) -> None:
        """Ask the head anew, whatever it was worth on other texts."""
        for has_others, least in _NEW_TEXT_WORTH.items():
            self._worth[has_others] = max(self._worth[has_others], least)
            self._pause[has_others], self._next_pause[has_others] = 0, 1
        # Where nothing is promised any more, nothing would show that it is kept again
        self._accepted = max(self._accepted, _LEAST_RELIABILITY * self._promised)

    def observe_step(self, num_emitted: int, seconds: float) -> None:
        """Take in what a step has brought.

        Args:
            num_emitted: Tokens that it emitted.
            seconds: What steps of its size take.
        """
        self._tokens += _RATE * (num_emitted - self._tokens)
        self._seconds += _RATE * (seconds - self._seconds)

    @property
    def rate(self) -> float:
        """Tokens per second of late; 0 before the first step."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def observe_promise(self, expected: float, accepted: int) -> None:
        """Take in what a draft has brought for which the head was asked.

        Args:
            expected: Accepted drafts that were expected of it.
            accepted: Those that there were.
        """
        self._promised += _KEPT_PROMISE * (expected - self._promised)
        self._accepted += _KEPT_PROMISE * (accepted - self._accepted)

    @property
    def reliability(self) -> float:
        """Accepted drafts by expected ones, of steps with the head.

        The best of many estimates are too good, however right each is on average.
        """
        return min(1.0, self._accepted / self._promised)

    def wants_head(self, has_others: bool) -> bool:
        """Whether the head shall be asked: not while it pauses, as it was not worth its time lately.

        Args:
            has_others: Whether other sources have a good draft already.
        """
        if self._pause[has_others] > 0:
            self._pause[has_others] -= 1
            return False
        return True

    def observe_head(self, has_others: bool, worth: float) -> None:
        """Take in what it was worth to ask the head, and when to ask it again if it was not.

        Args:
            has_others: Whether other sources had a good draft already.
            worth: In tokens, its time being taken off.
        """
        self._worth[has_others] += _WORTH[has_others] * (worth - self._worth[has_others])
        if self._worth[has_others] > 0:
            self._pause[has_others], self._next_pause[has_others] = 0, 1
            return
        self._pause[has_others] = self._next_pause[has_others]
        # Where it pays now and then it is looked at often, so that it is not long believed to be of no use
        self._next_pause[has_others] = 1 if worth > 0 else min(2 * self._next_pause[has_others], _LONGEST_PAUSE)


def experience_of(head: FSPADModel, target: PreTrainedModel, is_sampled: bool) -> Experience:
    """What earlier calls of this process have learned, with the same options of drafting.

    Args:
        head: The head that drafts.
        target: The model that verifies.
        is_sampled: Whether tokens are drawn, and drafts with the same random numbers.
    """
    config = head.config
    drafting = (config.lookup, config.draft_depth, config.draft_top_k, config.draft_vocab_size)
    key = (target.dtype, target.device, is_sampled, drafting)
    with _lock:
        targets = _known.setdefault(head, weakref.WeakKeyDictionary())
        return targets.setdefault(target, {}).setdefault(key, Experience())
