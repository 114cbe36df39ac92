"""Lookup: what is found, how far it is trusted, and that whole answers stay those of plain decoding."""

import math
import random

import pytest
import torch

from fspad.candidates import Candidates
from fspad.draft_size import FixedSize
from fspad.draft_source import Emitted
from fspad.lookup_source import LONGEST, MAX_CONTINUATION, PRIORS, SHORTEST, LookupSource, LookupTrust, NgramIndex
from helpers.comparing import generate
from helpers.models import make_head, make_target

SIZE = FixedSize(64, 5)


def show(source, *rows):
    """Show tokens to a source that looks at nothing else."""
    source.extend(Emitted([list(tokens) for tokens in rows], None, None, None))


def propose(source, roots=(0,), max_depth=100):
    candidates = [Candidates(root) for root in roots]
    source.propose(candidates, SIZE, max_depth)
    return candidates


def branches(candidates):
    """Every path of a collection that ends in a leaf, as tokens."""
    leaves = set(range(1, len(candidates))) - set(candidates.parents[1:])
    paths = []
    for leaf in leaves:
        path = []
        while leaf:
            path.append(candidates.tokens[leaf])
            leaf = candidates.parents[leaf]
        paths.append(path[::-1])
    return sorted(paths)


def found_by_scanning(tokens):
    """What the index must find, by looking at the whole text."""
    for n in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
        ends = [e for e in range(n, len(tokens)) if tokens[e - n : e] == tokens[-n:]]
        if ends:
            return [tokens[end : end + MAX_CONTINUATION] for end in reversed(ends[-2:])]
    return []


@pytest.mark.parametrize("seed", range(20))
def test_index_finds_what_a_scan_of_the_text_finds(seed):
    rng = random.Random(seed)
    index, tokens = NgramIndex(), []
    for _ in range(60):
        new = [rng.randrange(4) for _ in range(rng.randint(1, 5))]
        index.extend(new)
        tokens += new
        assert [continuation for _, continuation in index.continuations()] == found_by_scanning(tokens)


def test_length_of_a_match():
    index = NgramIndex()
    text = list(range(100, 150))
    index.extend([*text, 1, 2, *text[:20]])
    ((n, continuation),) = index.continuations()
    assert n == 20
    assert continuation == text[20 : 20 + MAX_CONTINUATION]
    index.extend(text[20:40])
    assert index.continuations()[0][0] == max(PRIORS)


def test_two_continuations_share_what_they_have_in_common():
    source = LookupSource()
    show(source, [1, 2, 3, 4, 5, 9, 1, 2, 3, 7, 8, 9, 1, 2])
    (candidates,) = propose(source)
    # The latest occurrence of "9 1 2" and nothing of "1 2" alone, because the longer match counts
    assert branches(candidates) == [[3, 7, 8, 9, 1, 2]]
    source = LookupSource()
    show(source, [1, 2, 3, 4, 8, 1, 2, 3, 7, 6, 1, 2])
    (candidates,) = propose(source, max_depth=3)
    assert branches(candidates) == [[3, 4, 8], [3, 7, 6]]
    latest, earlier = candidates.find(1, 7), candidates.find(1, 4)
    assert candidates.scores[latest] > candidates.scores[earlier]


def test_probabilities_are_products_that_grow_with_the_match():
    source = LookupSource()
    show(source, [1, 2, 3, 4, 5, 6, 7, 1, 2])
    (candidates,) = propose(source)
    expected = 0.0
    for offset, score in enumerate(candidates.scores[1:]):
        expected += math.log(source.trust.probability(2 + offset))
        assert score == pytest.approx(expected)
    assert source.trust.probability(2) == pytest.approx(PRIORS[2])
    assert source.trust.probability(1000) == pytest.approx(PRIORS[max(PRIORS)])


def test_trust_follows_what_was_right():
    source = LookupSource()
    show(source, [1, 2, 3, 4, 1, 2])
    before = source.trust.probability(2), source.trust.probability(3)
    propose(source)
    show(source, [3, 9])  # 3 was right, then 4 was proposed
    assert source.trust.probability(2) > before[0]
    assert source.trust.probability(3) < before[1]
    for new in range(10, 110):
        propose(source)
        show(source, [new, 1, 2])  # the text goes on as it never did
    assert source.trust.probability(2) < 0.3


def test_a_text_that_repeats_itself_is_trusted_soon():
    source = LookupSource()
    show(source, list(range(10)) * 3)
    for step in range(4):
        (candidates,) = propose(source)
        show(source, [(step * 10 + i) % 10 for i in range(10)])
    assert sum(math.exp(score) for score in candidates.scores[1:]) > 8


def test_nothing_is_found_in_a_text_without_repetition_and_rows_are_apart():
    source = LookupSource()
    show(source, [1, 2, 3, 4], [5, 6, 7, 5, 6])
    first, second = propose(source, roots=(4, 6))
    assert len(first) == 1
    assert branches(second) == [[7, 5, 6]]
    assert len(propose(source, roots=(4, 6), max_depth=1)[1]) == 2


@pytest.mark.parametrize("do_sample", [False, True])
def test_answers_with_lookup_are_plain_and_take_fewer_steps(do_sample):
    target = make_target(vocab_size=7)
    head = make_head(target, lookup=True, num_draft_tokens=12)
    prompt = torch.tensor([[1, 2, 3, 4, 5, 6] * 4])
    options = {"do_sample": do_sample, "max_new_tokens": 120, "min_new_tokens": 120}
    plain = generate(target, prompt, **options)
    steps = {}
    for lookup in (False, True):
        head.config.lookup = lookup
        ours = generate(target, prompt, head, **options)
        assert torch.equal(ours.sequences, plain.sequences)
        steps[lookup] = len(ours.accept_lengths)
    if not do_sample:  # a greedy answer of a small target ends in a loop
        assert steps[True] < steps[False]


def test_a_later_call_trusts_what_was_right_in_earlier_ones_and_soon_learns_better():
    trust = LookupTrust()
    prior = trust.probability(2)
    for _ in range(200):
        trust.learn(2, False)
    assert trust.probability(2) < 0.05 < prior == LookupTrust().probability(2)
    source = LookupSource(trust)
    show(source, [1, 2, 7, 1, 2])
    assert propose(source)[0].scores[1] < math.log(0.05)
    for _ in range(10):
        trust.learn(2, True)
    assert trust.probability(2) > 0.5


@pytest.mark.parametrize("is_right", [False, True])
def test_drafts_keep_a_probability_after_any_number_of_calls_of_one_kind(is_right):
    trust = LookupTrust()
    for _ in range(100_000):
        trust.learn(2, is_right)
        trust.learn(3, is_right)
    source = LookupSource(trust)
    # "1 2" went on in two ways
    show(source, [1, 2, 3, 4, 8, 1, 2, 3, 7, 6, 1, 2])
    (candidates,) = propose(source, max_depth=3)
    assert len(candidates) == 6
    assert all(-math.inf < score < 0 for score in candidates.scores[1:])
