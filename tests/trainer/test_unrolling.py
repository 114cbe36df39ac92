"""Unrolled training against what the head does while it drafts: the same chain, taken from every row at once."""

import pytest
import torch
from transformers import DynamicCache

from fspad.trainer.unrolling import step_masks, unroll, unrolled_mask
from helpers.models import make_head, make_target


def draft_chain(head, features, embeds, start, steps):
    """Draft from one row on, as decoding does: one true row after the other, then rows on own features."""
    cache = DynamicCache()
    true = head(features[:, : start + 1], embeds[:, : start + 1], past_key_values=cache, use_cache=True)
    outputs, regress = [true.predict[:, -1]], true.regress[:, -1:]
    for row in range(start + 1, start + steps):
        output = head(regress, embeds[:, row : row + 1], past_key_values=cache, use_cache=True)
        outputs.append(output.predict[:, -1])
        regress = output.regress
    return outputs


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_unrolled_rows_are_drafted_chains(attention):
    head = make_head(make_target()).double()
    head.set_attn_implementation(attention)
    features, embeds = torch.randn(2, 9, 32, dtype=torch.float64), torch.randn(2, 9, 32, dtype=torch.float64)
    with torch.no_grad():
        outputs = [output.predict for output in unroll(head, features, embeds, num_steps=4)]
        for start in range(6):
            for step, expected in enumerate(draft_chain(head, features, embeds, start, 4)):
                torch.testing.assert_close(outputs[step][:, start + step], expected, atol=1e-5, rtol=1e-5)


def test_unrolled_packed_dialogues_are_those_alone():
    head = make_head(make_target()).double()
    features, embeds = torch.randn(1, 11, 32, dtype=torch.float64), torch.randn(1, 11, 32, dtype=torch.float64)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]])
    with torch.no_grad():
        for steps in (1, 3):
            packed = list(unroll(head, features, embeds, steps, position_ids))
            for rows in (slice(0, 5), slice(5, 11)):
                alone = list(unroll(head, features[:, rows], embeds[:, rows], steps))
                for step in range(steps):
                    torch.testing.assert_close(packed[step].predict[:, rows][:, step:], alone[step].predict[:, step:])


def test_mask_literally():
    visible = unrolled_mask(torch.zeros(1, 4, 1), step=3)[0, 0] == 0
    #        step 1      | step 2     | step 3, keys 0 to 3 each
    assert visible.int().tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1],
    ]


def test_rows_count_as_long_as_the_chain_is_in_the_answer():
    rows = torch.tensor([[False, True, True, True, False, True]])
    assert step_masks(rows, 3).int().tolist() == [[[0, 1, 1, 1, 0, 1]], [[0, 0, 1, 1, 0, 0]], [[0, 0, 0, 1, 0, 0]]]


def test_gradients_flow_back_through_all_steps():
    head = make_head(make_target())
    features = torch.randn(1, 5, 32, requires_grad=True)
    *_, last = unroll(head, features, torch.randn(1, 5, 32), num_steps=3)
    (gradient,) = torch.autograd.grad(last.predict[0, 4].sum(), features)
    # Row 4 of step 3 began at row 2, and saw the true rows before it.
    assert gradient[0].abs().sum(dim=-1).gt(0).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_gradient_checkpointing_changes_no_gradient(num_steps, use_reentrant):
    """What runs again must not extend the cache again, and the keys in it must keep their gradients."""
    head = make_head(make_target()).train()
    features, embeds = torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    runs = []
    head.layer.mlp.gate_proj.register_forward_hook(lambda *_: runs.append(1))

    def gradients():
        head.zero_grad()
        outputs = list(unroll(head, features, embeds, num_steps))
        sum(output.predict.sin().sum() + output.regress.square().sum() for output in outputs).backward()
        return [parameter.grad.clone() for parameter in head.parameters()]

    expected = gradients()
    assert len(runs) == num_steps
    head.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for one, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert len(runs) == num_steps + 2 * num_steps


def test_half_precision_by_autocast():
    head = make_head(make_target(), initializer_range=0.05)
    features, embeds = torch.randn(2, 6, 32), torch.randn(2, 6, 32)
    with torch.no_grad():
        expected = list(unroll(head, features, embeds, num_steps=3))
        with torch.autocast("cpu", torch.bfloat16):
            outputs = list(unroll(head, features, embeds, num_steps=3))
    for step, (output, reference) in enumerate(zip(outputs, expected, strict=True)):
        torch.testing.assert_close(
            output.predict[:, step:].float(), reference.predict[:, step:], atol=0.05, rtol=0.05, msg=f"step {step}"
        )
