r"""Alignment and loss of FSPAD training.

Row i of the head pairs the feature f_i with the token i+1. Its label is the feature f_{i+1}, and it predicts token i+2:

    loss = v_w * SmoothL1(regress_i, f_{i+1}) - p_w * sum_v p_i(v) log q_i(v)

with `p_i = softmax(W f_{i+1})`, `q_i = softmax(W predict_i)` and `W` the target's LM head, averaged over the rows that
the assistant wrote.
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
    """

    features: torch.Tensor
    next_token_ids: torch.Tensor
    label_features: torch.Tensor
    row_mask: torch.Tensor

    def at_labels(self, values: torch.Tensor) -> torch.Tensor:
        """Pick values of the counted rows' labels.

        Args:
            values: One value for each token, of shape `(batch, length, ...)`.

        Returns:
            The values that belong to f_{i+1} in the rows that count, of shape `(rows, ...)`.
        """
        return values[:, 1:-1][self.row_mask]


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


def align(input_ids: torch.Tensor, features: torch.Tensor, assistant_mask: torch.Tensor) -> AlignedBatch:
    """Pair features, tokens and labels.

    Args:
        input_ids: Token ids of shape `(batch, length)`.
        features: The target's features of the same tokens, of shape `(batch, length, hidden)`.
        assistant_mask: 1 where a token is the assistant's, of shape `(batch, length)`.

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
    )


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


@dataclass
class SoftLabels:
    """The target's distribution in the counted rows, made for a few rows at a time.

    With a draft vocabulary the probabilities are those of the full vocabulary, not renormalised: a row weighs as much
    as the probability that the target gives to the tokens the head can draft at all.

    Args:
        features: Label features of the counted rows, of shape `(rows, hidden)`.
        target_head: From features to logits over the full vocabulary.
        draft_head: From features to logits over the draft vocabulary; `target_head` itself without one.
        draft_vocab_ids: Token ids that `draft_head` scores, of shape `(draft_vocab,)`; `None` for all.
        log_normalizers: `logsumexp` of the full logits of each row, of shape `(rows,)`, if known beforehand. Then no
            logits over the full vocabulary are made.
        best_token_ids: The target's most probable token of each row, of shape `(rows,)`, if known beforehand.
    """

    features: torch.Tensor
    target_head: Callable[[torch.Tensor], torch.Tensor]
    draft_head: Callable[[torch.Tensor], torch.Tensor]
    draft_vocab_ids: torch.Tensor | None = None
    log_normalizers: torch.Tensor | None = None
    best_token_ids: torch.Tensor | None = None

    @torch.no_grad()
    def __getitem__(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities over the draft vocabulary `(rows, draft_vocab)` and most probable tokens `(rows,)`."""
        if self.log_normalizers is not None and self.best_token_ids is not None:
            logits = _at_least_fp32(self.draft_head(self.features[rows]))
            return (logits - self.log_normalizers[rows, None].to(logits.device)).exp_(), self.best_token_ids[rows]
        log_normalizers, best_token_ids, logits = summarize_logits(self.target_head(self.features[rows]))
        if self.draft_vocab_ids is not None:
            logits = logits.index_select(-1, self.draft_vocab_ids)
        return (logits - log_normalizers[:, None]).exp_(), best_token_ids


def summarize_logits(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reduce logits over the full vocabulary to what the loss needs of them beside the draft vocabulary's.

    Args:
        logits: Logits of shape `(rows, vocab)`.

    Returns:
        Their `logsumexp` and most probable tokens, of shape `(rows,)` each, and the logits in at least fp32.
    """
    logits = _at_least_fp32(logits)
    return logits.logsumexp(dim=-1), logits.argmax(dim=-1), logits


def logits_loss(predict: torch.Tensor, labels: SoftLabels, chunk_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft cross-entropy of the draft's distribution against the target's, summed over rows.

    Never more than `chunk_size` rows of logits exist at once; the gradient of each chunk is formed with its loss.

    Args:
        predict: Predictions of the counted rows, of shape `(rows, hidden)`.
        labels: Labels of the same rows, with the LM heads.
        chunk_size: Rows at once.

    Returns:
        The loss, a scalar in at least fp32, and the number of rows where both have the same most probable token.
    """
    return _ChunkedSoftCrossEntropy.apply(predict, labels, chunk_size)


class _ChunkedSoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, predict: torch.Tensor, labels: SoftLabels, chunk_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(predict) if needs_gradient else None
        loss = predict.new_zeros((), dtype=torch.promote_types(predict.dtype, torch.float32))
        correct = torch.zeros((), dtype=torch.long, device=predict.device)
        for start in range(0, predict.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            chunk = predict[rows].detach().requires_grad_(needs_gradient)
            with torch.set_grad_enabled(needs_gradient):
                logits = labels.draft_head(chunk)
            target_probs, target_best = labels[rows]
            log_probs = F.log_softmax(_at_least_fp32(logits.detach()), dim=-1)  # (rows, draft vocab)
            best = log_probs.argmax(dim=-1)
            if labels.draft_vocab_ids is not None:
                best = labels.draft_vocab_ids[best]
            correct += (best == target_best.to(best.device)).sum().to(correct.device)
            loss -= torch.dot(target_probs.flatten(), log_probs.flatten()).to(loss.device)
            if gradient is not None:
                mass = target_probs.sum(dim=-1, keepdim=True)
                logits_gradient = log_probs.exp_().mul_(mass).sub_(target_probs).to(logits.dtype)
                # Through the LM head by autograd, so that any of them, with its scale and soft cap, is right.
                (gradient[rows],) = torch.autograd.grad(logits, chunk, logits_gradient)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, loss_gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * loss_gradient.to(gradient.dtype), None, None


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
