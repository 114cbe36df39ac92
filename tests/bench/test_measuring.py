"""What is measured of one answer, and the sums over several."""

import pytest
import torch

from fspad.bench.forward_watch import ForwardWatch
from fspad.bench.measuring import Answer, Comparison, mean_tokens_per_step, measure
from helpers.models import make_head, make_target

# 1 s of prefill and 9 steps of 0.5 s; 2 s of prefill and one step of 1 s
PLAIN = [Answer([1] * 10, 5.5, prefill_seconds=1.0), Answer([2, 3], 3.0, prefill_seconds=2.0)]
ASSISTED = [Answer([1] * 10, 3.5, [4, 5], 0.25, 1.25, 1.0), Answer([2, 4], 3.0, [1], 0.125, 0.625, 2.0)]


def make_inputs(target, length=12):
    torch.manual_seed(1)
    input_ids = torch.randint(0, 97, (1, length))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def test_tau():
    assert mean_tokens_per_step([4, 5, 1]) == pytest.approx(10 / 3)
    assert mean_tokens_per_step(iter([])) == 1.0


def test_times_of_steps_and_efficiency():
    comparison = Comparison(PLAIN, ASSISTED)
    assert comparison.plain_step_seconds == pytest.approx(5.5 / 10)
    assert comparison.draft_step_seconds == pytest.approx(0.375 / 3)
    assert comparison.verify_step_seconds == pytest.approx(1.875 / 3)
    assert comparison.speedup == pytest.approx(8.5 / 6.5)
    assert comparison.efficiency == pytest.approx((8.5 / 6.5) / ((10 / 3) * 0.55 / 0.625))
    assert (comparison.num_identical, comparison.is_identical) == (1, False)


def test_efficiency_is_whole_if_nothing_but_steps_takes_time():
    plain, assisted = Answer([1] * 9, 8.0, prefill_seconds=0.0), Answer([1] * 9, 3.0, [4, 4], 0.0, 3.0, 0.0)
    assert Comparison([plain], [assisted]).efficiency == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize(
    ("plain", "assisted"),
    [
        (Answer([1, 2], 2.0), ASSISTED[1]),  # an unknown prefill
        (Answer([1], 2.0, prefill_seconds=2.0), ASSISTED[1]),  # no step
        (PLAIN[1], Answer([2, 4], 3.0, [1])),  # an unknown verification
        (PLAIN[1], Answer([2, 4], 3.0, [], 0.0, 0.0, 2.0)),
        (PLAIN[1], Answer([2, 4], 3.0, [1], 0.0, 0.0, 2.0)),  # plain fallback
    ],
)
def test_what_is_not_known_is_not_made_up(plain, assisted):
    assert Comparison([plain], [assisted]).efficiency is None


@pytest.mark.parametrize(
    ("values", "message"),
    [({"seconds": 0.0}, "seconds to be positive"), ({"accept_lengths": [0]}, "at least 1, got 0")],
)
def test_impossible_answers_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Answer(**{"token_ids": [1], "seconds": 1.0, **values})


def count_forwards(target):
    """How many rows each forward pass of the target's layers had: a check that is independent of `ForwardWatch`."""
    rows = []
    target.model.layers[-1].register_forward_hook(lambda module, args, output: rows.append(args[0].shape[1]))
    return rows


def test_plain_answer():
    target = make_target()
    answer = measure(target, make_inputs(target), None, 9)
    assert (len(answer.token_ids), answer.accept_lengths, answer.draft_seconds) == (9, [], None)
    assert answer.prefill_seconds > 0
    assert answer.verify_seconds > 0
    assert answer.prefill_seconds + answer.verify_seconds < answer.seconds
    assert not target._forward_hooks
    assert not target._forward_pre_hooks


def test_answer_with_a_head():
    target = make_target()
    answer = measure(target, make_inputs(target), make_head(target), 9)
    assert sum(answer.accept_lengths) == 8
    times = answer.draft_seconds, answer.verify_seconds, answer.prefill_seconds
    assert min(times) > 0
    assert sum(times) < answer.seconds


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompt_lookup_counts_the_tokens_of_each_step(temperature):
    target = make_target(sharpness=40.0)
    inputs = make_inputs(target)
    # Text that repeats itself is found again
    inputs["input_ids"] = inputs["input_ids"][:, :4].repeat(1, 3)
    rows = count_forwards(target)
    answer = measure(target, inputs, None, 40, temperature, prompt_lookup_num_tokens=10)
    assert len(answer.accept_lengths) == len(rows) - 1, "the prefill is no step"
    assert all(length <= num_rows for length, num_rows in zip(answer.accept_lengths, rows[1:], strict=True))
    prefill = len(answer.token_ids) - sum(answer.accept_lengths)
    assert 1 <= prefill <= 11
    if temperature == 0:
        assert answer.token_ids == measure(target, inputs, None, 40).token_ids
        assert mean_tokens_per_step(answer.accept_lengths) > 1


def test_early_exit_counts_no_draft_for_a_step():
    target = make_target()
    inputs = make_inputs(target)
    rows = []
    target.model.layers[2].register_forward_hook(lambda module, args, output: rows.append(1))
    answer = measure(target, inputs, None, 12, assistant_early_exit=2)
    assert target.config.num_hidden_layers == 3
    assert len(answer.accept_lengths) == len(rows) - 1
    assert answer.token_ids == measure(target, inputs, None, 12).token_ids


def test_the_target_is_let_go_of_after_an_error():
    target = make_target()
    with pytest.raises(IndexError), ForwardWatch(target):
        target(torch.tensor([[1, 200]]))  # of 97 tokens
    assert not target._forward_hooks
    assert not target._forward_pre_hooks
