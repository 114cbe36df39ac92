r"""Alignment and loss of FSPAD training.

Row i of the head pairs the feature f_i with the token i+1. Its label is the feature f_{i+1}, and it predicts token i+2:

    loss = v_w * SmoothL1(regress_i, f_{i+1}) - p_w * sum_v p_i(v) log q_i(v)

with `p_i = softmax(W f_{i+1})`, `q_i = softmax(W predict_i)` and `W` the target's LM head (its rows of the draft
vocabulary, if there is one), averaged over the rows that the assistant wrote. A further term is a function of
[`CountedRows`], and a line in [`compute_losses`].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from fspad.modeling_fspad import FSPADOutput

    from .training_arguments import FSPADTrainingArguments


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


@dataclass
class CountedRows:
    """What the loss is a function of: the rows that count, of all draft steps.

    Args:
        predict: What goes to the LM head, of shape `(steps, rows, hidden)`.
        regress: Predicted features, of shape `(steps, rows, hidden)`.
        label_features: True features of the same rows, of shape `(rows, hidden)`.
        mask: Which rows count at each step, of shape `(steps, rows)` and dtype bool; at the first step all do.
    """

    predict: torch.Tensor
    regress: torch.Tensor
    label_features: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def select(cls, outputs: Sequence[FSPADOutput], batch: AlignedBatch, step_masks: torch.Tensor) -> CountedRows:
        """Select the rows that count at the first step.

        Args:
            outputs: The head's output of each draft step.
            batch: The batch that they are of.
            step_masks: Which rows count at each step, of shape `(steps, batch, length)`; those of later steps are among
                those of the first.

        Returns:
            The rows.
        """
        places = batch.row_mask.flatten().nonzero().squeeze(1)

        def rows_of(hidden: torch.Tensor) -> torch.Tensor:
            return hidden.flatten(0, 1).index_select(0, places)

        predict = torch.stack([rows_of(output.predict) for output in outputs])
        # Without partial alignment both are the same vector
        is_same = all(output.predict is output.regress for output in outputs)
        regress = predict if is_same else torch.stack([rows_of(output.regress) for output in outputs])
        return cls(predict, regress, rows_of(batch.label_features), step_masks.flatten(1)[:, places])


_COUNTS = ("rows", "correct", "in_top_k", "tokens")


@dataclass
class LossSums:
    """Sums over the counted rows of each draft step; every tensor but `tokens` is of shape `(steps,)`.

    Args:
        terms: Terms of the loss by name, without their weights, and `loss` with them.
        rows: Counted rows.
        correct: Rows whose most probable token is the target's.
        in_top_k: Rows where the target's most probable token is among the k of the draft.
        tokens: Tokens of the batches, padding left out, a scalar; `None` if nobody counts them.
    """

    terms: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    in_top_k: torch.Tensor | None = None
    tokens: torch.Tensor | None = None

    def add(self, other: LossSums) -> None:
        """Add other sums to these.

        Args:
            other: Sums of as many draft steps.
        """
        for name, value in other.terms.items():
            self.terms[name] = self.terms[name] + value if name in self.terms else value
        for name in _COUNTS:
            mine, others = getattr(self, name), getattr(other, name)
            if others is not None:
                setattr(self, name, others if mine is None else mine + others)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> LossSums:
        """Apply a function to each tensor, such as a sum over processes.

        Args:
            function: From a tensor to another.

        Returns:
            New sums.
        """
        counts = {name: value for name in _COUNTS if (value := getattr(self, name)) is not None}
        terms = {name: function(value) for name, value in self.terms.items()}
        return LossSums(terms, **{name: function(value) for name, value in counts.items()})

    def averages(self, step_weights: torch.Tensor, top_k: int | None = None) -> dict[str, float]:
        """Average over rows.

        Args:
            step_weights: Weight of each trained draft step, of shape `(trained steps,)`.
            top_k: The k of `in_top_k`, if it is to be told.

        Returns:
            Each term, summed over the trained steps as in the loss; and the accuracy of every step.
        """
        if self.rows is None:
            return {}
        first = max(1.0, self.rows[0].item())
        weights = step_weights.to(self.rows.device)
        metrics = {
            name: (values[: len(weights)] * weights).sum().item() / first for name, values in self.terms.items()
        }
        for step, (correct, rows) in enumerate(zip(self.correct.tolist(), self.rows.tolist(), strict=True), start=1):
            metrics["accuracy" if step == 1 else f"accuracy_depth_{step}"] = correct / max(1.0, rows)
        if top_k is not None:
            metrics[f"accuracy_top_{top_k}"] = self.in_top_k[0].item() / first
        return metrics


def compute_losses(
    rows: CountedRows,
    args: FSPADTrainingArguments,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    top_k: int = 1,
) -> tuple[torch.Tensor, LossSums]:
    """The loss of a batch, summed over its counted rows.

    Args:
        rows: The counted rows of all draft steps; of those beyond the trained ones only the sums are told.
        args: Weights of terms and steps.
        lm_head: From features to logits, over the vocabulary that the head scores.
        top_k: How many of the draft's most probable tokens are looked at.

    Returns:
        The weighted loss, a scalar; and the sums that it was made of, without a gradient.
    """
    sum_logits_loss, correct, in_top_k = logits_loss(
        rows.predict, rows.label_features, rows.mask, lm_head, args.logits_chunk_size, top_k
    )
    terms = {
        "feature_loss": (args.feature_loss_weight, feature_loss(rows)),
        "logits_loss": (args.logits_loss_weight, sum_logits_loss),
    }
    step_weights = args.draft_step_weights.to(rows.mask.device)
    trained = len(step_weights)
    loss = sum(weight * (value[:trained] * step_weights).sum() for weight, value in terms.values())
    sums = {name: value.detach().float() for name, (_, value) in terms.items()}
    sums["loss"] = sum(weight * sums[name] for name, (weight, _) in terms.items())
    return loss, LossSums(sums, rows.mask.sum(dim=1).float(), correct.float(), in_top_k.float())


def feature_loss(rows: CountedRows) -> torch.Tensor:
    """Smooth L1 distance of predicted and true features, averaged over the hidden size and summed over rows.

    Args:
        rows: The counted rows of all draft steps.

    Returns:
        The sum of each draft step, of shape `(steps,)` and at least fp32.
    """
    regress = _at_least_fp32(rows.regress)
    labels = rows.label_features.to(regress.dtype).expand_as(regress)
    distance = F.smooth_l1_loss(regress, labels, reduction="none").mean(dim=-1)  # (steps, rows)
    return (distance * rows.mask).sum(dim=1)


def logits_loss(
    predict: torch.Tensor,
    label_features: torch.Tensor,
    mask: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    chunk_size: int = 64,
    top_k: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Soft cross-entropy of the draft's distribution against the target's, summed over rows.

    With a draft vocabulary both are distributions over its tokens: what the head can never draft is not worth the
    full vocabulary's logits, which would cost more than the head itself.

    Never more than `chunk_size` rows of logits exist at once; the gradient of each chunk is formed with its loss. The
    target's distribution is computed once for all draft steps.

    Args:
        predict: Predictions, of shape `(steps, rows, hidden)`.
        label_features: Features whose logits are the soft labels, of shape `(rows, hidden)`.
        mask: Which rows count at each step, of shape `(steps, rows)` and dtype bool.
        lm_head: From features to logits, over the vocabulary that the head scores.
        chunk_size: Rows at once.
        top_k: How many of the draft's most probable tokens are looked at, at the first step.

    Returns:
        For each step, of shape `(steps,)`: the loss, in at least fp32; the number of rows where both have the same most
        probable token; and the number of those where the target's most probable token is among the `top_k` of the draft.
    """
    return _ChunkedSoftCrossEntropy.apply(predict, label_features, mask, lm_head, chunk_size, top_k)


class _ChunkedSoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        predict: torch.Tensor,
        label_features: torch.Tensor,
        mask: torch.Tensor,
        lm_head: Callable[[torch.Tensor], torch.Tensor],
        chunk_size: int,
        top_k: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        needs_gradient = ctx.needs_input_grad[0]
        num_steps, num_rows, _ = predict.shape
        gradient = torch.zeros_like(predict) if needs_gradient else None
        loss = predict.new_zeros(num_steps, dtype=torch.promote_types(predict.dtype, torch.float32))
        correct = torch.zeros(num_steps, dtype=torch.long, device=predict.device)
        in_top_k = torch.zeros_like(correct)
        for start in range(0, num_rows, chunk_size):
            chunk = slice(start, start + chunk_size)
            probs = F.softmax(_at_least_fp32(lm_head(label_features[chunk])), dim=-1)
            best = probs.argmax(dim=-1, keepdim=True)  # (rows, 1)
            for step in range(num_steps):
                drafts = predict[step, chunk].detach().requires_grad_(needs_gradient)
                with torch.set_grad_enabled(needs_gradient):
                    logits = lm_head(drafts)
                counted = mask[step, chunk].to(logits.device)
                log_probs = F.log_softmax(_at_least_fp32(logits.detach()), dim=-1)
                loss[step] -= ((probs * log_probs).sum(dim=-1) * counted).sum().to(loss.device)
                agrees, is_near = _agreement(log_probs, best, top_k if step == 0 else 1)
                correct[step] += (agrees & counted).sum().to(correct.device)
                in_top_k[step] += (is_near & counted).sum().to(correct.device)
                if gradient is not None:
                    logits_gradient = log_probs.exp_().sub_(probs).mul_(counted[:, None]).to(logits.dtype)
                    # Through the LM head by autograd, so that any of them, with its scale and soft cap, is right.
                    (gradient[step, chunk],) = torch.autograd.grad(logits, drafts, logits_gradient)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct, in_top_k)
        return loss, correct, in_top_k

    @staticmethod
    def backward(ctx: Any, loss_gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * loss_gradient.to(gradient.dtype)[:, None, None], None, None, None, None, None


def _agreement(log_probs: torch.Tensor, best: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether a token is the draft's most probable one, and whether it is among the top k; each of shape `(rows,)`."""
    # A comparison with the maximum, as its place takes much longer to find
    agrees = log_probs.gather(1, best).squeeze(1) >= log_probs.amax(dim=-1)
    if top_k == 1:
        return agrees, agrees
    drafts = log_probs.topk(min(top_k, log_probs.shape[-1]), dim=-1).indices  # (rows, top_k)
    return agrees, (drafts == best).any(dim=-1)


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
