import math

import pytest
import torch

from fspad.agreement import Agreement
from fspad.calibration import Calibration
from fspad.candidates import Candidates
from fspad.drafted_nodes import DraftedNodes, propose_nodes


def two_levels(scores_1, scores_2, parents_2):
    nodes = DraftedNodes()
    nodes.add_level(torch.tensor([[10, 11]]), torch.tensor([[-1, -1]]), torch.tensor([scores_1]))
    tokens = torch.arange(20, 20 + len(scores_2))[None]
    nodes.add_level(tokens, torch.tensor([parents_2]), torch.tensor([scores_2]))
    return nodes


def test_best_nodes_by_hand():
    nodes = two_levels([-0.125, -2.0], [-0.5, -3.0, -2.5, -4.0], [0, 0, 1, 1])
    # By score: 10 (-0.125), 20 (-0.5), 11 (-2.0), 22 (-2.5); in the order of the levels: 10, 11, 20, 22
    assert nodes.best(4) == [[(0, 10, -1, -0.125), (1, 11, -1, -2.0), (2, 20, 0, -0.5), (4, 22, 1, -2.5)]]


def test_a_child_that_ties_with_its_parent_never_replaces_it():
    # 20 is certain after 11, so it scores what 11 scores; only one of the two fits
    nodes = two_levels([-0.125, -0.25], [-0.25, -5.0, -5.0, -5.0], [1, 0, 0, 1])
    assert nodes.best(2) == [[(0, 10, -1, -0.125), (1, 11, -1, -0.25)]]


def test_only_nodes_above_the_worst_kept_can_have_descendants_in_the_tree():
    nodes = two_levels([-0.1, -2.0], [-0.5, -3.0, -2.5, -4.0], [0, 0, 1, 1])

    def can_improve(scores, num_kept):
        return nodes.can_improve(torch.tensor([scores]), num_kept)

    assert can_improve([-0.5, -2.5], 3)
    assert not can_improve([-2.0], 3)  # a tie, which the earlier node wins
    assert can_improve([-2.0], 4)
    assert can_improve([-9.0], 7)  # there is room


DRAFTED = [(0, 10, -1, -0.125), (1, 11, -1, -2.0), (2, 20, 0, -0.5), (4, 22, 1, -2.5)]


def test_where_others_are_silent_nodes_are_proposed_as_they_are():
    candidates = Candidates(7)
    assert propose_nodes(candidates, DRAFTED, None, Agreement()) == []
    assert candidates.tokens == [7, 10, 11, 20, 22]
    assert candidates.parents == [0, 0, 0, 1, 2]
    assert candidates.scores == pytest.approx([0.0, -0.125, -2.0, -0.5, -2.5])


def test_what_others_proposed_is_pooled_at_every_node():
    agreement, candidates = Agreement(), Candidates(7)
    first = candidates.add(0, 11, math.log(0.6))
    second = candidates.add(first, 22, math.log(0.6 * 0.7))
    opinions = propose_nodes(candidates, DRAFTED, None, agreement)
    assert opinions == [(11, pytest.approx(0.6), pytest.approx(math.exp(-2.0)))]
    root = agreement.probability(0.6, math.exp(-2.0))
    assert math.exp(candidates.scores[first]) == pytest.approx(root)
    below = agreement.probability(0.7, math.exp(-0.5))
    assert math.exp(candidates.scores[second]) == pytest.approx(root * below)
    rival = math.exp(-0.125) * (1 - root) / (1 - math.exp(-2.0))
    assert math.exp(candidates.scores[candidates.find(0, 10)]) == pytest.approx(rival)


def test_probabilities_are_corrected_by_depth_before_they_are_pooled():
    calibration, candidates = Calibration(), Candidates(7)
    for _ in range(50):  # right twice as often as it says, at the first depth
        calibration.learn([(0, 10, -1, math.log(0.25))], [10])
        calibration.learn([(0, 10, -1, math.log(0.25))], [9])
    propose_nodes(candidates, [(0, 10, -1, math.log(0.25))], calibration, Agreement())
    assert calibration.correction(1) > math.log(1.5)
    assert candidates.scores[1] == pytest.approx(math.log(0.25) + calibration.correction(1))


def test_impossible_nodes_stay_impossible():
    candidates = Candidates(7)
    propose_nodes(candidates, [(0, 10, -1, -math.inf), (1, 20, 0, -math.inf)], None, Agreement())
    assert candidates.scores == [0.0, -math.inf, -math.inf]
