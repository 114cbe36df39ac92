"""Plain decoding for what a head cannot assist, with the same kind of report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _CountingCriteria(StoppingCriteriaList):
    """Stopping criteria that remember which rows were still running at each step."""

    def __init__(self, criteria: StoppingCriteriaList):
        super().__init__(criteria)
        self.running: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        is_done = super().__call__(input_ids, scores, **kwargs)
        before = self.running[-1] if self.running else torch.ones_like(is_done)
        self.running.append(before & ~is_done)
        return is_done


def decode_plainly(
    target: PreTrainedModel, input_ids: torch.LongTensor, stopping_criteria: StoppingCriteriaList, **kwargs: Any
) -> tuple[GenerateDecoderOnlyOutput | torch.LongTensor, torch.LongTensor]:
    """Decode with the target's own loop.

    Args:
        target: The model.
        input_ids: The prompt, of shape `(batch, length)`.
        stopping_criteria: When to stop.
        **kwargs: The remaining arguments of `GenerationMixin._sample`.

    Returns:
        What that loop returns, and the accept lengths: ones for each token after the prefill's, of shape `(steps,)`, or
        `(batch, steps)` with zeros behind the end of a row.
    """
    criteria = _CountingCriteria(stopping_criteria)
    output = type(target)._sample(target, input_ids, stopping_criteria=criteria, **kwargs)
    # A row emits a token in a step if it was running before it; the first token is the prefill's. Some devices run a step
    # more than they return.
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    num_steps = sequences.shape[1] - input_ids.shape[1] - 1
    accept_lengths = torch.stack(criteria.running, dim=1)[:, :num_steps].long()
    return output, accept_lengths[0] if input_ids.shape[0] == 1 else accept_lengths
