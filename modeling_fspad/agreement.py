"""How probable a token is that one source has proposed, given how probable another finds it.

Where lookup trusts its token with 0.7, it is right in nine cases of ten if the head finds that token the best, and in three if
the head finds it improbable (SmolLM2, greedy). So what two sources say of one token is pooled: the log-odds of both, weighted,
give the log-odds of the pool (logistic regression, which learns the weights from what the target then emits).
"""

from __future__ import annotations

import math

# Weights of what was said before, of what is said now, and a constant: from SmolLM2's answers to prompts of several tasks
PRIOR_WEIGHTS = (0.4, 0.5, 0.7)
_LEARNING_RATE = 0.005
# A source that does not mention a token finds it improbable, not impossible; nor is anything sure
_LEAST, _MOST = 0.01, 0.99


class Agreement:
    """Pools what two sources say of a token, and learns how much each of them is worth."""

    def __init__(self) -> None:
        # Replaced as a whole, since calls in other threads read it
        self._weights = PRIOR_WEIGHTS

    def probability(self, before: float, said: float) -> float:
        """How probable a token is.

        Args:
            before: Its probability by the sources that proposed it.
            said: Its probability by another; 0 if that did not propose it.
        """
        return _logistic(sum(weight * x for weight, x in zip(self._weights, _inputs(before, said), strict=True)))

    def learn(self, before: float, said: float, is_right: bool) -> None:
        """Take in whether the token was right.

        Args:
            before: As in `probability`.
            said: As in `probability`.
            is_right: Whether the target has emitted it.
        """
        step = _LEARNING_RATE * (is_right - self.probability(before, said))
        self._weights = tuple(
            weight + step * x for weight, x in zip(self._weights, _inputs(before, said), strict=True)
        )


def _inputs(before: float, said: float) -> tuple[float, float, float]:
    return _log_odds(before), _log_odds(said), 1.0


def _log_odds(probability: float) -> float:
    probability = min(max(probability, _LEAST), _MOST)
    return math.log(probability / (1 - probability))


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))
