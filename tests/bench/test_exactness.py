"""Differences of greedy answers, and which of them are excused."""

import pytest
import torch

from fspad.bench import exactness
from fspad.bench.exactness import Exactness, check_exactness, score_gap
from fspad.bench.measuring import Answer, Comparison
from helpers.models import make_target

INPUTS = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}


@pytest.fixture
def target():
    return make_target()


def plain_tokens(target):
    return target.generate(**INPUTS, max_new_tokens=6, do_sample=False)[0, 3:].tolist()


def test_gap_is_that_of_plain_decoding(target):
    plain = plain_tokens(target)
    logits = target(torch.tensor([[5, 6, 7, *plain[:2]]])).logits[0, -1].detach()
    second = int(logits.topk(2).indices[1])
    gap = score_gap(target, INPUTS, plain, [*plain[:2], second, 1, 2, 3])
    assert gap == pytest.approx(float(logits[plain[2]] - logits[second]), abs=1e-4)
    assert score_gap(target, INPUTS, plain, plain[:4]) == float("inf"), "a missing token is no near-tie"


def test_differences_at_near_ties_are_excused_and_counted(target, monkeypatch):
    plain = plain_tokens(target)
    other = [*plain[:2], (plain[2] + 1) % 97, *plain[3:]]
    comparisons = [Comparison([Answer(plain, 1.0)], [Answer(tokens, 1.0, [2])]) for tokens in (plain, other)]
    prompts = [INPUTS, INPUTS]
    assert check_exactness(target, prompts, comparisons) == Exactness(identical=1, near_ties=0, different=1)
    monkeypatch.setattr(exactness, "NEAR_TIE", 1e9)
    assert check_exactness(target, prompts, comparisons) == Exactness(identical=1, near_ties=1, different=0)


def test_words():
    assert str(Exactness(3, 0, 0)) == "identical"
    assert str(Exactness(2, 1, 0)) == "identical but for near-ties in 1"
    assert str(Exactness(1, 1, 1)) == "1 of 3 answers DIFFER"
