"""The rule by which drafts are sized, on costs that are known."""

import itertools
import math
import random

import pytest
import torch

from fspad.agreement import Agreement
from fspad.automatic_size import AutomaticSize
from fspad.candidates import Candidates
from fspad.draft_source import DraftSource, Emitted
from fspad.drafting import Drafter
from fspad.experience import Experience
from fspad.step_costs import costs_of
from fspad.verification_mode import VerificationMode
from helpers.comparing import generate
from helpers.drafters import tried
from helpers.models import make_head, make_target


def flat(size):
    return 0.03 + 0.0001 * size


def steep(size):
    return 0.03 * size


def candidates_of(*probabilities):
    candidates = Candidates(0)
    for token, probability in enumerate(probabilities):
        candidates.add(0, token, math.log(probability))
    return candidates


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_of_nodes_is_worth_more(seed):
    rng = random.Random(seed)
    slope = rng.choice([1e-4, 1e-3, 5e-3])
    size = AutomaticSize(tried(lambda n: 0.03 + slope * n), Experience(), depth=4)
    candidates = Candidates(0)
    for token in range(7):
        parent = rng.randrange(len(candidates))
        candidates.add(parent, token, candidates.scores[parent] + math.log(rng.uniform(0.05, 0.95)))

    def worth(nodes):
        accepted = sum(math.exp(candidates.scores[node]) for node in nodes)
        return accepted - size.rate * size.costs.verify(len(nodes) + 1)

    closed = [
        nodes
        for number in range(8)
        for nodes in itertools.combinations(range(1, 8), number)
        if all(candidates.parents[node] in (0, *nodes) for node in nodes)
    ]
    assert worth(size.choose(candidates)) == pytest.approx(max(map(worth, closed)))


def test_many_nodes_where_they_cost_nothing_and_none_where_each_costs_a_step():
    candidates = candidates_of(0.5, 0.2, 0.1, 0.05, 0.02)
    assert len(AutomaticSize(tried(flat), Experience(), 4).choose(candidates)) == 5
    assert AutomaticSize(tried(steep), Experience(), 4).choose(candidates) == []
    assert AutomaticSize(tried(steep), Experience(), 4).choose(Candidates(0)) == []


def test_levels_go_on_while_they_are_worth_their_time():
    for level_seconds, expected in ((0.0001, 4), (0.05, 1)):
        costs = tried(flat)
        for _ in range(200):
            for levels in (1, 2, 3):
                costs.observe_draft(levels, 0.001 + level_seconds * (levels - 1))
        size = AutomaticSize(costs, Experience(), depth=9)
        wanted = 0
        while (
            size.wants_level(Candidates(0), wanted, [math.log(0.3), math.log(0.1)] if wanted else None) and wanted < 4
        ):
            wanted += 1
        assert wanted == expected


def test_depth_and_threshold_are_limits():
    size = AutomaticSize(tried(flat), Experience(), depth=2, confidence_threshold=0.4)
    assert size.wants_level(Candidates(0), 2, [math.log(0.9)])
    assert not size.wants_level(Candidates(0), 3, [math.log(0.9)])
    assert not size.wants_level(Candidates(0), 2, [math.log(0.3)])


def play(size, steps, probability, acceptance):
    """Steps of a head that claims one probability and is right with another; how often it was asked."""
    rng = random.Random(0)
    asked = 0
    for _ in range(steps):
        size.begin()
        candidates = Candidates(0)
        if size.wants_level(candidates, 0, None):
            asked += 1
            candidates.add(0, 1, math.log(probability))
        nodes = size.choose(candidates)
        emitted = 1 + (bool(nodes) and rng.random() < acceptance)
        size.end(len(nodes) + 1, emitted, size.costs.draft(1) if asked else 0.0, size.costs.verify(len(nodes) + 1))
    return asked


def test_a_head_that_is_not_worth_its_time_is_asked_now_and_then_only():
    experience = Experience()
    assert play(AutomaticSize(tried(flat), experience, 4), 200, probability=0.01, acceptance=0.01) < 50
    assert play(AutomaticSize(tried(flat), experience, 4), 200, probability=0.01, acceptance=0.01) < 20
    assert play(AutomaticSize(tried(flat), Experience(), 4), 200, probability=0.6, acceptance=0.6) == 200


def test_a_head_that_gets_better_is_asked_again():
    size = AutomaticSize(tried(flat), Experience(), 4)
    play(size, 200, probability=0.01, acceptance=0.01)
    assert play(size, 200, probability=0.6, acceptance=0.6) > 120


class Seen(Experience):
    """Remembers what the head was worth."""

    def observe_head(self, has_others, worth):
        self.worth = worth


def test_a_head_that_doubts_a_long_match_is_worth_what_is_not_verified_then():
    """Also if it proposes nothing itself."""
    experience = Seen()
    size = AutomaticSize(tried(lambda nodes: 1 + 0.5 * nodes), experience, 4)
    worths = []
    for said in (1.0, 0.0):
        size.begin()
        candidates = Candidates(0)
        node = 0
        for depth in range(1, 7):
            node = candidates.add(node, depth, depth * math.log(0.9))
        assert size.choose(candidates), "what would be verified without the head"
        assert size.wants_level(candidates, 0, None)
        candidates.pool(0, {1: said}, Agreement())
        size.choose(candidates)
        worths.append(experience.worth)
    assert worths[1] > worths[0] + 0.3


class Long(DraftSource):
    """Proposes a long continuation, and another one after it."""

    def extend(self, emitted):
        pass

    def propose(self, candidates, size, max_depth):
        for first in (1, 50):
            node = 0
            for depth in range(12):
                node = candidates[0].add(node, first + depth, (depth + 1) * math.log(0.9))


class Doubting(DraftSource):
    """Finds all of that improbable, and something else probable, as a head may."""

    def extend(self, emitted):
        pass

    def propose(self, candidates, size, max_depth):
        if size.wants_level(candidates[0], 0, None):
            candidates[0].pool(0, {1: 0.0, 50: 0.0}, Agreement())
            candidates[0].add(0, 90, math.log(0.95))


def test_a_chain_is_judged_by_what_would_have_been_verified_without_the_head():
    """That is among all candidates, of which a chain has few."""
    size = AutomaticSize(tried(flat), Experience(), 4)
    drafter = Drafter([Long(), Doubting()], size, is_chain=True)
    drafter.extend(Emitted([[0]], torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), torch.zeros(1, 1).long()))
    for _ in range(5):
        tree = drafter.draft(20, torch.device("cpu"))
        assert tree.num_nodes > 1
        size.end(tree.num_nodes, 2, flat(1), flat(tree.num_nodes))


def test_a_match_that_is_sure_leaves_nothing_for_the_head():
    size = AutomaticSize(tried(flat), Experience(), 4)
    asked = 0
    for _ in range(50):
        size.begin()
        candidates = Candidates(0)
        node = 0
        for depth in range(1, 13):
            node = candidates.add(node, depth, depth * math.log(0.99))
        asked += size.wants_level(candidates, 0, None)
        size.end(len(size.choose(candidates)) + 1, 12, size.costs.draft(1), flat(13))
    assert asked < 15


def test_a_head_that_promises_too_much_is_verified_less():
    """Its estimates say that many drafts pay; half of what they promise comes."""

    def drafted(reliability):
        experience = Experience()
        for _ in range(400):
            experience.observe_promise(2.0, 2.0 * reliability)
        size = AutomaticSize(tried(lambda nodes: 1 + 0.08 * nodes), experience, 4)
        candidates = Candidates(0)
        assert size.wants_level(candidates, 0, None)
        for token in range(10):
            candidates.add(0, token, math.log(0.16 - 0.01 * token))
        return len(size.choose(candidates))

    assert drafted(0.5) < drafted(1.0)


@pytest.mark.parametrize("do_sample", [False, True])
def test_answers_are_plain_while_costs_are_tried_and_afterwards(do_sample):
    target = make_target(vocab_size=9)
    head = make_head(target, num_draft_tokens="auto", lookup=True)
    prompt = torch.tensor([[1, 2, 3, 4]])
    for seed in range(3):
        options = {"do_sample": do_sample, "max_new_tokens": 60, "seed": seed}
        plain, ours = generate(target, prompt, **options), generate(target, prompt, head, **options)
        assert torch.equal(plain.sequences, ours.sequences)
    assert costs_of(target, VerificationMode.TREE).trial is None
