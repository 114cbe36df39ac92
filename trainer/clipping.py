"""Clipping of gradients by value, as the paper does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainerControl, TrainerState

    from .training_arguments import FSPADTrainingArguments


class ClipGradientValues(TrainerCallback):
    """Clips gradients by value, once they are reduced over devices.

    Args:
        accelerator: The trainer's, to undo the loss scaling of fp16 first, which the trainer leaves to norm clipping.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def on_pre_optimizer_step(
        self,
        args: FSPADTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Clip right before the optimizer looks at the gradients."""
        if args.max_grad_value is not None:
            if args.max_grad_norm <= 0:
                self.accelerator.unscale_gradients()
            # Not the accelerator's method of that name, which raises under FSDP.
            nn.utils.clip_grad_value_(model.parameters(), args.max_grad_value)
