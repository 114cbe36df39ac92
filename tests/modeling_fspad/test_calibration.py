import math
import random

import pytest

from fspad.calibration import Calibration

# Two children of the root, and one child of each: index, token, parent, log-probability
DRAFTED = [(0, 5, -1, math.log(0.6)), (1, 6, -1, math.log(0.2)), (2, 7, 0, math.log(0.3)), (3, 8, 1, math.log(0.1))]


def test_nothing_is_corrected_before_anything_is_seen():
    calibration = Calibration()
    assert [calibration.correction(depth) for depth in (1, 2, 9)] == [0, 0, 0]


def test_corrections_are_ratios_of_accepted_and_expected_drafts():
    calibration = Calibration()
    calibration.learn(DRAFTED, [5, 9])
    # Accepted 1 of 0.8 expected at depth 1, none of 0.4 at depth 2; the prior counts as 4 of 4
    assert calibration.correction(1) == pytest.approx(math.log(5 / 4.8))
    assert calibration.correction(2) == pytest.approx(math.log(4 / 4.4))


def test_what_lies_below_the_last_emitted_token_tells_nothing():
    calibration = Calibration()
    calibration.learn(DRAFTED, [6])
    assert calibration.correction(1) > 0
    assert calibration.correction(2) == 0


@pytest.mark.parametrize("acceptance", [0.0, 0.25, 0.9])
def test_corrections_approach_the_truth(acceptance):
    rng = random.Random(0)
    calibration = Calibration()
    for _ in range(2000):
        token = 5 if rng.random() < acceptance else 9
        calibration.learn([(0, 5, -1, math.log(0.5))], [token, 1])
    corrected = 0.5 * math.exp(calibration.correction(1))
    # The prior, that the head is right, never fades entirely
    assert corrected == pytest.approx(acceptance, abs=0.12)
    assert corrected < 0.06 or acceptance > 0


def test_corrections_have_a_limit():
    calibration = Calibration()
    for _ in range(500):
        calibration.learn([(0, 5, -1, -20.0)], [5])
    assert calibration.correction(1) == pytest.approx(math.log(2))
