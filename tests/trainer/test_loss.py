"""Alignment and loss of training. The alignment is written out by hand: an off-by-one trains well and drafts nothing."""

import pytest
import torch
from torch.nn import functional as F

from fspad.target import LMHead
from fspad.trainer.loss import CountedRows, align, counted_rows, feature_loss, logits_loss
from helpers.models import make_target


def test_alignment_literally():
    #                           prompt      | answer
    input_ids = torch.tensor([[10, 11, 12, 13, 14, 15]])
    assistant_mask = torch.tensor([[0, 0, 0, 1, 1, 1]])
    features = torch.tensor([[[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]]])  # f_i = i

    batch = align(input_ids, features, assistant_mask)

    # Row 2 pairs the prompt's last feature with the answer's first token, and predicts its second: the first that counts.
    assert batch.features.tolist() == [[[0.0], [1.0], [2.0], [3.0]]]
    assert batch.next_token_ids.tolist() == [[11, 12, 13, 14]]
    assert batch.label_features.tolist() == [[[1.0], [2.0], [3.0], [4.0]]]
    assert batch.row_mask.tolist() == [[False, False, True, True]]


def test_alignment_of_two_turns():
    assistant_mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 1, 1, 1]])
    assert counted_rows(assistant_mask).tolist() == [[True, False, False, False, False, False, True, True]]


def test_alignment_refuses_other_features():
    with pytest.raises(ValueError, match="recompute the features"):
        align(torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 4, 2), torch.zeros(1, 5))


def as_rows(regress, labels, mask=None):
    mask = torch.ones(regress.shape[:2], dtype=torch.bool) if mask is None else mask
    return CountedRows(regress, regress, labels, mask)


def test_feature_loss_is_smooth_l1_averaged_over_the_hidden_size():
    regress = torch.tensor([[[0.0, 3.0], [0.5, 0.0]], [[0.0, 3.0], [9.0, 9.0]]])
    labels = torch.zeros(2, 2)
    mask = torch.tensor([[True, True], [True, False]])
    # |3| - 0.5 = 2.5 and 0.5 * 0.5^2 = 0.125, each over two elements; of the second step one row counts
    expected = torch.tensor([2.5 / 2 + 0.125 / 2, 2.5 / 2])
    torch.testing.assert_close(feature_loss(as_rows(regress, labels, mask)), expected)
    assert feature_loss(as_rows(regress.bfloat16(), labels)).dtype == torch.float32


def naive_logits_loss(predict, features, mask, lm_head):
    losses = -(lm_head(features).softmax(-1) * lm_head(predict).log_softmax(-1)).sum(-1)  # (steps, rows)
    return (losses * mask).sum(-1)


def one_step(predict, features, lm_head, **options):
    """The loss and counts of one draft step, of which all rows count."""
    mask = torch.ones(1, len(features), dtype=torch.bool)
    return [value[0] for value in logits_loss(predict[None], features, mask, lm_head, **options)]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("is_trimmed", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_logits_loss_is_the_naive_formula(softcap, is_trimmed, chunk_size):
    target = make_target(dtype=torch.float64).double()
    target.config.final_logit_softcapping = softcap
    target.config.logit_scale = None if softcap is None else 0.7
    ids = torch.randperm(97)[:20] if is_trimmed else None
    lm_head = LMHead(target, ids)
    features = torch.randn(7, 32, dtype=torch.float64)
    predict = (features + torch.randn(2, 7, 32, dtype=torch.float64)).requires_grad_()
    mask = torch.tensor([[True] * 7, [False, True, True, False, True, True, True]])
    weights = torch.tensor([3.0, 0.5])

    expected = naive_logits_loss(predict, features, mask, lm_head)
    (expected_gradient,) = torch.autograd.grad((weights * expected).sum(), predict)
    loss, correct, in_top_k = logits_loss(predict, features, mask, lm_head, chunk_size, top_k=4)
    (weights * loss).sum().backward()

    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(predict.grad, expected_gradient, rtol=1e-9, atol=1e-12)
    best, draft_logits = lm_head(features).argmax(-1), lm_head(predict)
    agrees = draft_logits.argmax(-1) == best
    assert torch.equal(correct, (agrees & mask).sum(-1))
    ranks = (draft_logits[0] > draft_logits[0].gather(1, best[:, None])).sum(-1)
    assert in_top_k[0] == (ranks < 4).sum() > correct[0]
    assert all(parameter.grad is None for parameter in target.parameters())


def test_logits_exist_for_one_chunk_only():
    target = make_target()
    head, seen = LMHead(target), []

    def counting_head(features):
        seen.append(len(features))
        return head(features)

    predict, mask = torch.randn(2, 10, 32, requires_grad=True), torch.ones(2, 10, dtype=torch.bool)
    logits_loss(predict, torch.randn(10, 32), mask, counting_head, chunk_size=4)[0].sum().backward()
    # The target's logits once, and those of both draft steps
    assert seen == [4] * 6 + [2] * 3


def test_bf16_target_has_fp32_loss():
    target = make_target().bfloat16()
    predict = torch.randn(6, 32, requires_grad=True)
    loss, *_ = one_step(predict, torch.randn(6, 32), LMHead(target))
    loss.backward()
    assert loss.dtype == predict.grad.dtype == torch.float32


def test_no_counted_rows():
    predict = torch.randn(0, 32, requires_grad=True)
    loss, correct, in_top_k = one_step(predict, torch.randn(0, 32), LMHead(make_target()), top_k=4)
    loss.backward()
    assert loss == 0
    assert correct == in_top_k == 0


def test_loss_is_lowest_at_the_target_itself():
    head = LMHead(make_target())
    features = torch.randn(4, 32)
    best, correct, in_top_k = one_step(features, features, head)
    log_probs = F.log_softmax(head(features), -1)
    torch.testing.assert_close(best, -(log_probs.exp() * log_probs).sum().detach())
    assert correct == in_top_k == 4
    assert one_step(features + 0.1, features, head)[0] > best
