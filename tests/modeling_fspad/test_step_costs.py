import copy

import pytest

from fspad.step_costs import TRIALS, StepCosts, costs_of
from fspad.verification_mode import VerificationMode
from helpers.drafters import tried
from helpers.models import make_target


def linear(size):
    return 0.03 + 0.001 * size


def test_the_first_steps_are_trials():
    costs = StepCosts()
    wanted = []
    while (size := costs.trial) is not None:
        wanted.append(size)
        costs.observe_verify(size, 1.0)
    assert tuple(wanted) == TRIALS
    assert set(wanted) == {1, 4, 8, 16, 32}


def test_times_in_between_are_interpolated_and_those_beyond_extrapolated():
    costs = tried(linear)
    for size in (1, 2, 4, 11, 16, 25, 32, 64):
        assert costs.verify(size) == pytest.approx(linear(size))
    assert costs.verify_all(40) == pytest.approx([linear(size) for size in range(1, 41)])


def test_a_hiccup_in_one_trial_does_not_count():
    seen = []

    def once_slow(size):
        seen.append(size)
        return linear(size) * (10 if seen.count(size) == 1 else 1)

    assert tried(once_slow).verify(16) == pytest.approx(linear(16))


def test_fewer_nodes_never_cost_more():
    costs = tried(lambda size: 0.05 if size == 4 else 0.03 + 0.001 * size)
    times = costs.verify_all(40)
    assert times == sorted(times)
    assert costs.verify(4) == pytest.approx(0.038)


def test_trials_with_fewer_nodes_than_wanted_count_as_what_they_were():
    costs = StepCosts()
    while (size := costs.trial) is not None:
        costs.observe_verify(min(size, 3), linear(min(size, 3)))
    assert costs.verify(3) == pytest.approx(linear(3))
    assert costs.verify(9) == pytest.approx(linear(9))


def test_times_before_any_trial_decide_nothing():
    costs = StepCosts()
    assert costs.verify_all(3) == [1.0, 1.0, 1.0]
    costs.observe_verify(16, 0.5)
    assert costs.verify_all(3) == [0.5, 0.5, 0.5]


def test_real_steps_correct_all_sizes_and_their_own_most():
    costs = tried(linear)
    for _ in range(200):
        costs.observe_verify(8, 2 * linear(8))
    assert costs.verify(8) == pytest.approx(2 * linear(8), rel=0.01)
    # A longer context or a busy machine makes every step slower
    assert costs.verify(1) > 1.1 * linear(1)
    before = costs.verify(8)
    costs.observe_verify(8, 1000.0)
    assert costs.verify(8) < 1.3 * before


def test_sizes_that_no_trial_came_near_to_are_learned_later():
    costs = StepCosts()
    while costs.trial is not None:
        costs.observe_verify(1, 0.03)
    for _ in range(200):
        costs.observe_verify(40, 0.2)
        costs.observe_verify(1, 0.03)
    assert costs.verify(1) == pytest.approx(0.03, rel=0.1)
    assert costs.verify(40) == pytest.approx(0.2, rel=0.1)


def test_drafting_times_are_those_of_a_line():
    costs = tried(linear)
    assert costs.draft(0) == 0
    assert costs.draft(2) == pytest.approx(2 * linear(1) / 10)
    for step in range(600):
        levels = 1 + step % 4
        costs.observe_draft(levels, 0.006 + 0.003 * (levels - 1))
    assert costs.draft(1) == pytest.approx(0.006, rel=0.05)
    assert costs.draft(4) == pytest.approx(0.015, rel=0.05)


def test_first_drafts_for_which_kernels_are_loaded_do_not_count():
    costs = StepCosts()
    slow = [0.3, 0.3, 0.1]
    while (size := costs.trial) is not None:
        if size > 1:
            costs.observe_draft(6, 6 * 0.002 + (slow.pop(0) if slow else 0.0))
        costs.observe_verify(size, linear(size))
    assert costs.draft(1) == pytest.approx(0.002)
    assert costs.draft(6) == pytest.approx(0.012)


def test_costs_belong_to_a_target_its_dtype_and_the_way_it_verifies():
    target = make_target()
    costs = costs_of(target, VerificationMode.TREE)
    assert costs_of(target, VerificationMode.TREE) is costs
    assert costs_of(target, VerificationMode.CHAIN) is not costs
    assert costs_of(copy.deepcopy(target), VerificationMode.TREE) is not costs
    assert costs_of(target.double(), VerificationMode.TREE) is not costs
