r"""Multi-step training: the head is unrolled on its own features, with the attention it has while it drafts.

At inference only the first draft step sees a true feature; the next ones feed on the head's own. Training them (as
HASS, arXiv 2408.15766, and EAGLE-3, arXiv 2503.01840, do for their heads) means for step j and row i:

    input feature   f_i for j = 1, else regress of step j-1 at row i-1
    attends to      step 1 at rows <= i-j+1, step m at row i-j+m for m = 2..j

which is what a chain sees that was drafted from row i-j+1 on. Labels and token embeddings are those of row i always.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

if TYPE_CHECKING:
    from fspad.modeling_fspad import FSPADModel, FSPADOutput


def unroll(
    head: FSPADModel,
    features: torch.Tensor,
    inputs_embeds: torch.Tensor,
    num_steps: int = 1,
    position_ids: torch.LongTensor | None = None,
) -> Iterator[FSPADOutput]:
    """Run the head for one draft step after the other. Gradients flow through all of them.

    Args:
        head: The head, maybe wrapped for distributed training.
        features: True features of the target at positions t, of shape `(batch, length, hidden)`.
        inputs_embeds: The target's embeddings of the tokens at t+1, of shape `(batch, length, hidden)`.
        num_steps: Draft steps.
        position_ids: Positions t, of shape `(batch, length)`, if several dialogues stand in a row: they restart at 0
            with each.

    Yields:
        The output of each step, with row i always predicting the feature at position i+1. At step j the first j-1
        rows of a dialogue have no meaning; see [`step_masks`].
    """
    if num_steps == 1:
        yield head(features=features, inputs_embeds=inputs_embeds, position_ids=position_ids)
        return
    cache = DynamicCache()
    for step in range(1, num_steps + 1):
        output = head(
            features=features,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids if position_ids is not None else _positions(features),
            attention_mask=unrolled_mask(features, step, position_ids),
            past_key_values=cache,
            use_cache=True,
        )
        yield output
        features = torch.cat([features[:, :1], output.regress[:, :-1].to(features.dtype)], dim=1)


def unrolled_mask(features: torch.Tensor, step: int, position_ids: torch.LongTensor | None = None) -> torch.Tensor:
    """Attention mask of one draft step over its own keys and those of the steps before.

    Args:
        features: Tensor of shape `(batch, length, hidden)`, which gives length, device and dtype.
        step: The draft step, from 1.
        position_ids: Of shape `(batch, length)`, restarting at 0 with each dialogue; `None` for one dialogue a row.

    Returns:
        Additive mask of shape `(1 or batch, 1, length, step * length)` in the dtype of `features`.
    """
    length = features.shape[1]
    rows = torch.arange(length, device=features.device)
    distance = rows[:, None] - rows[None]  # (length, length), of a key behind its query
    own_steps = [distance == step - earlier for earlier in range(2, step + 1)]
    allowed = torch.cat([distance >= step - 1, *own_steps], dim=-1)[None]
    if position_ids is not None:
        dialogues = (position_ids == 0).cumsum(dim=1)
        together = dialogues[:, :, None] == dialogues[:, None]  # (batch, length, length)
        allowed = allowed & together.repeat(1, 1, step)
    # A row too early for this step has no true feature to see. Its own key keeps the softmax finite.
    allowed = allowed | (torch.arange(step * length, device=rows.device) == rows[:, None] + (step - 1) * length)
    mask = torch.zeros(allowed.shape, dtype=features.dtype, device=features.device)
    return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)[:, None]


def step_masks(row_mask: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Which rows count at each draft step: those whose chain began at a counted row and never left the answer.

    Args:
        row_mask: Counted rows, bool, of shape `(..., rows)`; see [`~fspad.trainer.loss.counted_rows`].
        num_steps: Draft steps.

    Returns:
        A bool tensor of shape `(num_steps, ..., rows)`.
    """
    masks = [row_mask]
    for _ in range(1, num_steps):
        earlier = torch.nn.functional.pad(masks[-1][..., :-1], (1, 0), value=False)
        masks.append(row_mask & earlier)
    return torch.stack(masks)


def _positions(features: torch.Tensor) -> torch.LongTensor:
    return torch.arange(features.shape[1], device=features.device)[None]
