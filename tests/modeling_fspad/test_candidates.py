import math
import random

import pytest

from fspad.agreement import Agreement
from fspad.candidates import Candidates


def test_the_root_is_certain():
    candidates = Candidates(7)
    assert len(candidates) == 1
    assert (candidates.tokens, candidates.parents, candidates.scores) == ([7], [0], [0.0])
    assert candidates.ranking() == []
    assert candidates.select([]) == ([7], [0])


def test_of_equal_nodes_the_larger_score_counts():
    candidates = Candidates(7)
    node = candidates.add(0, 3, -2.0)
    assert candidates.add(0, 3, -1.0) == candidates.add(0, 3, -4.0) == node
    assert candidates.scores[node] == -1.0
    assert len(candidates) == 2
    assert candidates.find(0, 3) == node
    assert candidates.find(0, 4) is None
    assert candidates.find(node, 3) is None
    assert candidates.add(node, 3, -1.5) != node


@pytest.mark.parametrize(("score", "expected"), [(-0.5, -1.0), (3.0, -1.0), (math.nan, -math.inf), (-2.0, -2.0)])
def test_no_child_is_more_probable_than_its_parent(score, expected):
    candidates = Candidates(7)
    parent = candidates.add(0, 3, -1.0)
    assert candidates.scores[candidates.add(parent, 4, score)] == expected


def test_nodes_are_chosen_by_score_and_stand_in_the_order_of_the_proposals():
    candidates = Candidates(7)
    for parent, token, score in [(0, 10, -0.1), (0, 11, -2.0), (1, 20, -0.5), (1, 21, -3.0), (2, 22, -2.5)]:
        candidates.add(parent, token, score)
    assert candidates.ranking() == [1, 3, 2, 5, 4]
    assert candidates.select(candidates.ranking()[:4]) == ([7, 10, 11, 20, 22], [0, 0, 0, 1, 2])
    expected = [0, math.exp(-0.1), math.exp(-0.5), math.exp(-2.0)]
    assert candidates.expected_tokens([1, 3, 2]) == pytest.approx([sum(expected[: n + 1]) for n in range(4)])


def test_a_child_that_ties_with_its_parent_never_replaces_it():
    candidates = Candidates(7)
    parent = candidates.add(0, 10, -1.0)
    child = candidates.add(parent, 11, -1.0)
    candidates.add(0, 12, -0.5)
    assert candidates.ranking() == [3, parent, child]


def test_ancestors_are_closed_under_many_ties_and_bad_scores():
    """Also when a second source raises a child that another has proposed."""
    rng = random.Random(0)
    for _ in range(300):
        candidates = Candidates(0)
        for _ in range(40):
            score = rng.choice([0.0, -1.0, -1.0, -2.0, -2.0, math.nan, -math.inf, 1.0])
            candidates.add(rng.randrange(len(candidates)), rng.randrange(3), score)
        ranking = candidates.ranking()
        assert sorted(ranking) == list(range(1, len(candidates)))
        for size in (1, 5, 11, len(ranking)):
            tokens, parents = candidates.select(ranking[:size])
            assert len(tokens) == len(parents) == min(size, len(ranking)) + 1
            assert all(parent < node for node, parent in enumerate(parents[1:], start=1))
            assert len(set(zip(parents[1:], tokens[1:], strict=True))) == len(tokens) - 1


class Mean(Agreement):
    """Pools as nobody would, so that results are seen at a glance."""

    def probability(self, before, said):
        return (before + said) / 2


def test_what_two_sources_say_of_a_token_is_pooled_and_the_others_share_the_rest():
    candidates = Candidates(7)
    parent = candidates.add(0, 5, math.log(0.5))
    known = candidates.add(parent, 10, math.log(0.5 * 0.8))
    below = candidates.add(known, 11, math.log(0.5 * 0.8 * 0.3))
    other = candidates.add(0, 12, math.log(0.1))
    judged = candidates.pool(parent, {10: 0.2, 20: 0.6, 21: 0.2}, Mean())
    assert judged == [(10, pytest.approx(0.8), 0.2)]
    probabilities = [math.exp(score) for score in candidates.scores]
    assert probabilities[known] == pytest.approx(0.5 * 0.5)
    assert probabilities[below] == pytest.approx(0.5 * 0.5 * 0.3), "its descendants keep their share"
    assert probabilities[other] == pytest.approx(0.1)
    # 0.8 was left by the second source, 0.5 by the pool
    assert probabilities[candidates.find(parent, 20)] == pytest.approx(0.5 * 0.6 * 0.5 / 0.8)
    assert probabilities[candidates.find(parent, 21)] == pytest.approx(0.5 * 0.2 * 0.5 / 0.8)


def test_a_token_that_the_later_source_does_not_name_is_pooled_too():
    candidates = Candidates(7)
    known = candidates.add(0, 10, math.log(0.8))
    assert candidates.pool(0, {20: 0.9}, Mean()) == [(10, pytest.approx(0.8), 0.0)]
    assert math.exp(candidates.scores[known]) == pytest.approx(0.4)
    assert math.exp(candidates.scores[candidates.find(0, 20)]) == pytest.approx(0.9 * 0.6)


def test_without_other_proposals_a_pool_is_what_was_said():
    candidates = Candidates(7)
    assert candidates.pool(0, {20: 0.9, 21: 0.0}, Mean()) == []
    assert [math.exp(score) for score in candidates.scores] == pytest.approx([1.0, 0.9, 0.0])


def test_children_are_never_more_probable_than_their_parent_however_sources_disagree():
    rng = random.Random(0)
    for _ in range(300):
        candidates = Candidates(0)
        for _ in range(12):
            score = rng.choice([0.0, -0.1, -1.0, -3.0, -math.inf, math.nan])
            candidates.add(rng.randrange(len(candidates)), rng.randrange(4), score)
        before = len(candidates)
        for parent in rng.sample(range(before), min(4, before)):
            names = rng.sample(range(8), 3)
            said = rng.choice([(0.3, 0.3, 0.4), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0)])
            candidates.pool(parent, dict(zip(names, said, strict=True)), Agreement())
            children = [node for node in range(1, len(candidates)) if candidates.parents[node] == parent]
            total = sum(math.exp(candidates.scores[node]) for node in children)
            assert total <= math.exp(candidates.scores[parent]) * (1 + 1e-9)
        assert not any(math.isnan(score) for score in candidates.scores)
        assert all(candidates.scores[n] <= candidates.scores[candidates.parents[n]] for n in range(len(candidates)))
