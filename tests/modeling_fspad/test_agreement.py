import random

import pytest

from fspad.agreement import PRIOR_WEIGHTS, Agreement


def test_a_source_that_agrees_makes_a_token_more_probable_and_one_that_does_not_less():
    agreement = Agreement()
    for before in (0.15, 0.5, 0.9):
        said = [agreement.probability(before, now) for now in (0.0, 0.1, 0.5, 0.9, 1.0)]
        assert said == sorted(said)
        assert said[0] < before < said[-1]
    assert 0 < agreement.probability(0.0, 0.0) < agreement.probability(1.0, 1.0) < 1


@pytest.mark.parametrize("good", ["before", "said"])
def test_it_learns_who_is_worth_listening_to(good):
    """One source knows how probable a token is, the other says anything."""
    rng, agreement = random.Random(0), Agreement()
    for _ in range(5000):
        truth, noise = rng.choice([0.1, 0.9]), rng.choice([0.1, 0.9])
        both = (truth, noise) if good == "before" else (noise, truth)
        agreement.learn(*both, rng.random() < truth)
    for noise in (0.1, 0.9):
        for truth in (0.1, 0.9):
            both = (truth, noise) if good == "before" else (noise, truth)
            assert agreement.probability(*both) == pytest.approx(truth, abs=0.06)


def test_nothing_is_learned_twice_by_calls_that_share_it():
    agreement = Agreement()
    weights = agreement._weights
    agreement.learn(0.5, 0.9, False)
    assert weights == PRIOR_WEIGHTS != agreement._weights, "others may still read the old weights"
    assert agreement.probability(0.5, 0.9) < Agreement().probability(0.5, 0.9)
