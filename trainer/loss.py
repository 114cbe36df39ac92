r"""Alignment and loss of FSPAD training.

Row i of the head pairs the feature f_i with the token i+1. Its label is the feature f_{i+1}, and it predicts token i+2:

    loss = v_w * SmoothL1(regress_i, f_{i+1}) - p_w * sum_v p_i(v) log q_i(v)

with `p_i = softmax(W f_{i+1})`, `q_i = softmax(W predict_i)` and `W` the target's LM head (its rows of the draft
vocabulary, if there is one), averaged over the rows that the assistant wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F


@dataclass
class AlignedBatch:
    """Inputs and labels of the head, row by row.

    Args:
        features: Features f_i, of shape `(batch, length - 2, hidden)`.
        next_token_ids: Tokens i+1, of shape `(batch, length - 2)`.
        label_features: Features f_{i+1}, of shape `(batch, length - 2, hidden)`.
        row_mask: Whether row i counts, of shape `(batch, length - 2)` and dtype bool.
        position_ids: Positions i of packed dialogues, of shape `(batch, length - 2)`; `None` if they are not packed.
    """

    features: torch.Tensor
    next_token_ids: torch.Tensor
    label_features: torch.Tensor
    row_mask: torch.Tensor
    position_ids: torch.Tensor | None = None


def counted_rows(assistant_mask: torch.Tensor) -> torch.Tensor:
    """Which rows count: those whose two next tokens are both the assistant's.

    Drafting starts once the first token of an answer is known, so the first row pairs the prompt's last feature with
    that token.

    Args:
        assistant_mask: 1 where a token is the assistant's, of shape `(..., length)`.

    Returns:
        A bool tensor of shape `(..., length - 2)`.
    """
    mask = assistant_mask.bool()
    return mask[..., 1:-1] & mask[..., 2:]


def align(
    input_ids: torch.Tensor,
    features: torch.Tensor,
    assistant_mask: torch.Tensor,
    position_ids: torch.Tensor | None = None,
) -> AlignedBatch:
    """Pair features, tokens and labels.

    Args:
        input_ids: Token ids of shape `(batch, length)`.
        features: The target's features of the same tokens, of shape `(batch, length, hidden)`.
        assistant_mask: 1 where a token is the assistant's, of shape `(batch, length)`.
        position_ids: Of shape `(batch, length)`, restarting at 0 with each dialogue, if several are packed into a row.

    Returns:
        One row for each position that has two tokens after it.

    Raises:
        ValueError: If the shapes do not belong together.
    """
    if not input_ids.shape == features.shape[:2] == assistant_mask.shape:
        raise ValueError(
            "expected one feature and one mask value for each token, got input_ids of shape "
            f"{tuple(input_ids.shape)}, features of shape {tuple(features.shape)} and assistant_mask of shape "
            f"{tuple(assistant_mask.shape)}; recompute the features of this dataset."
        )
    return AlignedBatch(
        features=features[:, :-2],
        next_token_ids=input_ids[:, 1:-1],
        label_features=features[:, 1:-1],
        row_mask=counted_rows(assistant_mask),
        position_ids=None if position_ids is None else position_ids[:, :-2],
    )


def dialogue_lengths(attention_mask: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    """Tokens in the dialogue that a token belongs to.

    Args:
        attention_mask: 1 where a token is not padding, of shape `(batch, length)`.
        position_ids: Of shape `(batch, length)`, restarting at 0 with each dialogue, if several are packed into a row.

    Returns:
        A tensor of shape `(batch, length)` and dtype int64; without packing all of a row are the same.
    """
    if position_ids is None:
        return attention_mask.sum(dim=1, keepdim=True).expand_as(attention_mask)
    dialogues = (position_ids == 0).cumsum(dim=1)  # (batch, length), from 1
    counts = torch.zeros_like(position_ids).scatter_add(1, dialogues - 1, torch.ones_like(position_ids))
    return counts.gather(1, dialogues - 1)


def feature_loss(regress: torch.Tensor, label_features: torch.Tensor) -> torch.Tensor:
    """Smooth L1 distance of predicted and true features, averaged over the hidden size and summed over rows.

    Args:
        regress: Predicted features of the counted rows, of shape `(rows, hidden)`.
        label_features: True features of the same rows, of shape `(rows, hidden)`.

    Returns:
        A scalar in at least fp32.
    """
    regress = _at_least_fp32(regress)
    distance = F.smooth_l1_loss(regress, label_features.to(regress.dtype), reduction="none")
    return distance.mean(dim=-1).sum()


def logits_loss(
    predict: torch.Tensor,
    label_features: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    chunk_size: int = 128,
    top_k: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Soft cross-entropy of the draft's distribution against the target's, summed over rows.

    With a draft vocabulary both are distributions over its tokens: what the head can never draft is not worth the
    full vocabulary's logits, which would cost more than the head itself.

    Never more than `chunk_size` rows of logits exist at once; the gradient of each chunk is formed with its loss.

    Args:
        predict: Predictions of the counted rows, of shape `(rows, hidden)`.
        label_features: Features whose logits are the soft labels, of shape `(rows, hidden)`.
        lm_head: From features to logits, over the vocabulary that the head scores.
        chunk_size: Rows at once.
        top_k: How many of the draft's most probable tokens are looked at.

    Returns:
        The loss, a scalar in at least fp32; the number of rows where both have the same most probable token; and the
        number of those where the target's most probable token is among the `top_k` of the draft.
    """
    return _ChunkedSoftCrossEntropy.apply(predict, label_features, lm_head, chunk_size, top_k)


class _ChunkedSoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        predict: torch.Tensor,
        label_features: torch.Tensor,
        lm_head: Callable[[torch.Tensor], torch.Tensor],
        chunk_size: int,
        top_k: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(predict) if needs_gradient else None
        loss = predict.new_zeros((), dtype=torch.promote_types(predict.dtype, torch.float32))
        correct = torch.zeros((), dtype=torch.long, device=predict.device)
        in_top_k = torch.zeros_like(correct)
        for start in range(0, predict.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            chunk = predict[rows].detach().requires_grad_(needs_gradient)
            with torch.set_grad_enabled(needs_gradient):
                draft_logits = lm_head(chunk)
            chunk_loss, logits_gradient, chunk_correct, chunk_in_top_k = _soft_cross_entropy(
                draft_logits.detach(), lm_head(label_features[rows]), needs_gradient, top_k
            )
            if gradient is not None:
                # Through the LM head by autograd, so that any of them, with its scale and soft cap, is right.
                (gradient[rows],) = torch.autograd.grad(draft_logits, chunk, logits_gradient)
            loss += chunk_loss.to(loss.device)
            correct += chunk_correct.to(correct.device)
            in_top_k += chunk_in_top_k.to(in_top_k.device)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct, in_top_k)
        return loss, correct, in_top_k

    @staticmethod
    def backward(ctx: Any, loss_gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * loss_gradient.to(gradient.dtype), None, None, None, None


def _soft_cross_entropy(
    draft_logits: torch.Tensor, target_logits: torch.Tensor, needs_gradient: bool, top_k: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Loss, its gradient with respect to the draft's logits, and the rows that agree on the best token and in the top k."""
    target_probs = F.softmax(_at_least_fp32(target_logits), dim=-1)
    draft_log_probs = F.log_softmax(_at_least_fp32(draft_logits), dim=-1)
    loss = -torch.dot(target_probs.flatten(), draft_log_probs.flatten())
    best = target_probs.argmax(dim=-1)
    correct = in_top_k = (draft_log_probs.argmax(dim=-1) == best).sum()
    if top_k > 1:
        drafts = draft_log_probs.topk(min(top_k, draft_log_probs.shape[-1]), dim=-1).indices  # (rows, top_k)
        in_top_k = (drafts == best[:, None]).sum()
    if not needs_gradient:
        return loss, None, correct, in_top_k
    logits_gradient = draft_log_probs.exp_().sub_(target_probs)
    return loss, logits_gradient.to(draft_logits.dtype), correct, in_top_k


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
