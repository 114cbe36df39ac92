import math

import pytest

from fspad.candidates import Candidates
from fspad.draft_size import FixedSize


@pytest.mark.parametrize(("depth", "num_draft_tokens", "levels"), [(3, 15, 4), (0, 15, 1), (5, 2, 2), (5, 1, 1)])
def test_fixed_size_wants_so_many_levels_and_none_that_could_not_be_kept(depth, num_draft_tokens, levels):
    size = FixedSize(num_draft_tokens, depth)
    wanted = [size.wants_level(Candidates(5), level, None) for level in range(8)]
    assert wanted == [level < levels for level in range(8)]


def test_threshold_is_for_the_best_path():
    size = FixedSize(15, 5, 0.5)
    assert size.needs_scores
    assert size.wants_level(Candidates(5), 0, None)
    assert size.wants_level(Candidates(5), 1, [math.log(0.1), math.log(0.51)])
    assert not size.wants_level(Candidates(5), 1, [math.log(0.1), math.log(0.49)])
    assert not FixedSize(15, 5).needs_scores


def test_the_best_are_chosen_whoever_proposed_them():
    candidates = Candidates(5)
    first = candidates.add(0, 6, -1.0)
    second = candidates.add(0, 7, -0.5)
    third = candidates.add(second, 8, -0.75)
    assert FixedSize(2, 5).choose(candidates) == [second, third]
    assert FixedSize(9, 5).choose(candidates) == [second, third, first]
