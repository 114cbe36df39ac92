"""What calls learn from one another: the rate, when to ask the head, how far to trust it."""

import gc

import pytest
import torch

from fspad import experience as module
from fspad import generation_fspad
from fspad.automatic_size import AutomaticSize
from fspad.experience import Experience, experience_of
from fspad.step_costs import StepCosts
from helpers.comparing import generate
from helpers.models import make_head, make_target


def test_rate_is_tokens_over_time_and_follows_what_is_seen():
    experience = Experience()
    assert experience.rate == 0
    for _ in range(3):
        experience.observe_step(1, 0.1)
        experience.observe_step(5, 0.2)
    # A mean of rates would be 17.5
    assert experience.rate == pytest.approx(20, rel=0.03)
    for _ in range(300):
        experience.observe_step(1, 0.1)
    assert experience.rate == pytest.approx(10, rel=0.01)


def asked_in(experience, steps, worth, has_others=False):
    asked = 0
    for _ in range(steps):
        if experience.wants_head(has_others):
            asked += 1
            experience.observe_head(has_others, worth)
    return asked


def test_where_others_have_a_good_draft_a_head_that_is_not_worth_its_time_pauses_longer_and_longer():
    experience = Experience()
    assert asked_in(experience, 100, worth=-0.1, has_others=True) == 7
    assert asked_in(experience, 100, worth=-0.1, has_others=True) == 3
    assert experience.wants_head(False), "where others have none was not tried yet"
    asked_in(experience, 100, worth=2.0, has_others=True)
    assert asked_in(experience, 100, worth=2.0, has_others=True) == 100


def test_where_others_have_none_it_takes_many_bad_steps_for_a_head_to_pause():
    experience = Experience()
    assert asked_in(experience, 25, worth=-0.1) == 25
    asked_in(experience, 100, worth=-0.1)
    assert asked_in(experience, 100, worth=-0.1) == 3
    # A good head has bad steps too, and does not pause for them
    experience = Experience()
    assert asked_in(experience, 100, worth=0.5) == 100
    assert asked_in(experience, 20, worth=-0.5) == 20
    assert asked_in(experience, 100, worth=0.5) > 90


def test_a_head_that_pays_now_and_then_is_looked_at_often():
    experience = Experience()
    asked_in(experience, 200, worth=-0.5)
    assert asked_in(experience, 64, worth=-0.5) <= 2
    # The average is still below 0, but single looks show that it pays again
    assert asked_in(experience, 64, worth=0.2) > 8
    assert asked_in(experience, 200, worth=0.2) > 180


def test_each_answer_asks_the_head_anew():
    experience = Experience()
    for has_others in (False, True):
        asked_in(experience, 300, worth=-2.0, has_others=has_others)
    experience.begin_answer()
    assert asked_in(experience, 50, worth=0.3) == 50
    # Of no use all the same: few steps of an answer are spent on finding out
    experience.begin_answer()
    asked_in(experience, 300, worth=-0.1)
    experience.begin_answer()
    assert asked_in(experience, 96, worth=-0.1) <= 16
    # Trust that was earned is kept
    experience = Experience()
    asked_in(experience, 300, worth=1.0)
    experience.begin_answer()
    assert asked_in(experience, 20, worth=-0.5) == 20


def test_promises_that_are_not_kept_are_discounted_and_those_that_are_exceeded_are_not():
    experience = Experience()
    assert experience.reliability == 1
    for number in range(400):
        experience.observe_promise(2.0, number % 2)
    assert experience.reliability == pytest.approx(0.25, abs=0.02)
    experience.begin_answer()
    assert experience.reliability == pytest.approx(0.5)
    for _ in range(400):
        experience.observe_promise(1.0, 3)
    assert experience.reliability == 1


def test_it_belongs_to_head_and_target_and_how_they_draft_and_choose():
    target, other = make_target(), make_target()
    head = make_head(target)
    known = experience_of(head, target, False)
    assert experience_of(head, target, False) is known
    others = [
        experience_of(*key) for key in ((head, target, True), (head, other, False), (make_head(target), target, False))
    ]
    head.config.lookup = not head.config.lookup
    others.append(experience_of(head, target, False))
    assert all(experience is not known for experience in others)


def test_nothing_is_kept_of_a_head_or_target_that_is_gone():
    target = make_target()
    head = make_head(target)
    experience_of(head, target, False)
    before = len(module._known)
    del head
    gc.collect()
    assert len(module._known) < before
    head = make_head(target)
    experience_of(head, target, False)
    del target
    gc.collect()
    assert len(module._known[head]) == 0


class KnownCosts(StepCosts):
    """Costs that no machine changes."""

    trial = None

    def verify_all(self, most):
        return [1 + 0.1 * n for n in range(most)]

    def draft(self, num_levels):
        return 0.3 * num_levels

    def observe_verify(self, num_nodes, seconds):
        pass

    def observe_draft(self, num_levels, seconds):
        pass


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_later_call_begins_with_what_earlier_ones_have_learned(do_sample, monkeypatch):
    """A head that knows nothing costs a second answer less than the first, and no answer its text."""
    target = make_target(vocab_size=97)
    head = make_head(target, num_draft_tokens="auto", lookup=False)
    asked, wants = [], AutomaticSize.wants_level

    def counted(self, candidates, level, scores):
        wanted = wants(self, candidates, level, scores)
        asked.append(wanted and level == 0)
        return wanted

    monkeypatch.setattr(AutomaticSize, "wants_level", counted)
    monkeypatch.setattr(generation_fspad, "costs_of", lambda target, mode: KnownCosts())
    prompt, numbers = torch.tensor([[1, 2, 3, 4, 5]]), []
    for seed in range(3):
        asked.clear()
        plain, ours = (
            generate(target, prompt, assistant, seed=seed, max_new_tokens=100, do_sample=do_sample)
            for assistant in (None, head)
        )
        assert torch.equal(plain.sequences, ours.sequences)
        numbers.append(sum(asked))
    experience = experience_of(head, target, do_sample)
    assert experience.rate > 0
    assert numbers[0] > numbers[1] > 0
    assert numbers[2] <= numbers[1]
