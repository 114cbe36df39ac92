"""Arguments of [`FSPADTrainer`]."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import logging

from fspad.bench.machine import native_dtype
from fspad.config_checks import MOST

logger = logging.get_logger(__name__)

# What the paper (arXiv 2408.15562) trained with, for targets of 7B and more and 68,000 dialogues.
PAPER = MappingProxyType(
    {
        "learning_rate": 5e-5,
        "warmup_steps": 2000,
        "num_train_epochs": 20.0,
        "num_draft_steps": 1,
        "feature_loss_weight": 1.0,
        "logits_loss_weight": 0.1,
        "feature_noise": 0.2,
        "max_grad_value": 0.5,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_length": 2048,
    }
)

# Smallest values, and whether the value itself is one too
_SMALLEST: dict[str, tuple[float, bool]] = {
    "per_device_train_batch_size": (1, True),
    "per_device_eval_batch_size": (1, True),
    "gradient_accumulation_steps": (1, True),
    "learning_rate": (0, False),
    "weight_decay": (0, True),
    "max_grad_norm": (0, True),
    "max_grad_value": (0, False),
    "max_length": (3, True),
    "draft_vocab_size": (1, True),
    "num_draft_steps": (1, True),
    "draft_step_decay": (0, False),
    "feature_loss_weight": (0, True),
    "logits_loss_weight": (0, True),
    "feature_noise": (0, True),
    "logits_chunk_size": (1, True),
    "num_eval_prompts": (0, True),
    "eval_max_new_tokens": (1, True),
}


@dataclass
class FSPADTrainingArguments(TrainingArguments):
    """Arguments of [`FSPADTrainer`]. `FSPADTrainingArguments(output_dir, **PAPER)` has the values of the paper.

    Only what differs from [`~transformers.TrainingArguments`] is listed.

    Args:
        learning_rate: Peak learning rate of AdamW. Heads of small targets (a hidden size below about 1,000) learn faster
            with 1e-3.
        adam_beta2: Second beta of AdamW.
        warmup_steps: Linear warm-up: a share of all steps, or from 1 on their number.
        num_train_epochs: Passes over the dataset.
        logging_steps: Steps between log lines.
        bf16: Whether to compute in bfloat16. On a processor that has no such instructions it is float32, with a warning.
        max_grad_norm: Gradient norm clipping; off, because gradients are clipped by value.
        max_grad_value: Largest absolute value of a gradient's element; `None` turns it off.
        remove_unused_columns: Must stay `False`: the columns belong to the data collator, not to the head's `forward`.
        ddp_find_unused_parameters: Off, because every parameter of a head has a gradient in every step.
        max_length: Dialogues are cut to this many tokens.
        packing: Whether to put several dialogues into one row of up to `max_length` tokens.
        draft_vocab_size: How many tokens the head scores, those that the assistant writes most often in the training
            dataset; `None` for those of the head as it is, which is all of the target's for a new one.
        features_dir: Folder to compute the target's features into, once, before training, or to use them again from;
            `None` to compute them while training needs them.
        num_draft_steps: Draft steps that are trained; from the second on the head sees its own features, as it does when
            it drafts. 1 is the paper's training.
        draft_step_decay: Weight of each draft step by that of the one before it, of which the first has 1.
        feature_loss_weight: Weight of the regression of the target's features.
        logits_loss_weight: Weight of the soft cross-entropy against the target's distribution.
        feature_noise: Width of the uniform noise on the input features at 512 tokens; it shrinks as `1 / length`.
        logits_chunk_size: Positions whose logits over the vocabulary are held in memory at once.
        num_eval_prompts: Prompts of the evaluation dataset, its first distinct ones, that each evaluation decodes plainly
            and with the head to measure tau and speedup; 0 turns it off.
        eval_max_new_tokens: Most tokens of such an answer.
        num_draft_tokens: Drafted tokens that the head verifies in a step, saved with it: a number, `"auto"` for as many as
            pay on the machine that it runs on, or `"measure"` to choose at the end of training what was fastest here
            (`"auto"`, unless a fixed number is faster by more than 5%). `None` leaves it as the head has it.
    """

    learning_rate: float = field(
        default=3e-4, metadata={"help": "Peak learning rate of AdamW; 1e-3 is better for small targets."}
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "Second beta of AdamW."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Linear warm-up: a share of all steps, or from 1 on their number."}
    )
    num_train_epochs: float = field(default=10.0, metadata={"help": "Passes over the dataset."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
    bf16: bool = field(
        default=False,
        metadata={"help": "Compute in bfloat16; in float32 on a processor that has no such instructions."},
    )
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "Gradient norm clipping; off, because gradients are clipped by value."}
    )
    max_grad_value: float | None = field(
        default=0.5, metadata={"help": "Largest absolute value of a gradient's element; None turns it off."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the columns belong to the data collator, not to `forward`."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Off: every parameter of a head has a gradient in every step."}
    )
    max_length: int = field(default=2048, metadata={"help": "Dialogues are cut to this many tokens."})
    packing: bool = field(
        default=False, metadata={"help": "Put several dialogues into one row of up to max_length tokens."}
    )
    draft_vocab_size: int | None = field(
        default=None,
        metadata={"help": "Let the head score only so many tokens, the most frequent ones of the training answers."},
    )
    features_dir: str | None = field(
        default=None,
        metadata={"help": "Folder to compute the target's features into, once, or to use them again from."},
    )
    num_draft_steps: int = field(
        default=1,
        metadata={
            "help": "Draft steps that are trained, from the second on on the head's own features; 1: the paper."
        },
    )
    draft_step_decay: float = field(
        default=1.0, metadata={"help": "Weight of each draft step by that of the one before it."}
    )
    feature_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of the regression of the target's features."}
    )
    logits_loss_weight: float = field(
        default=0.1, metadata={"help": "Weight of the soft cross-entropy against the target's distribution."}
    )
    feature_noise: float = field(
        default=0.2,
        metadata={"help": "Width of the uniform noise on the input features at 512 tokens; it shrinks as 1/length."},
    )
    logits_chunk_size: int = field(
        default=64, metadata={"help": "Positions whose logits over the vocabulary are held in memory at once."}
    )
    num_eval_prompts: int = field(
        default=4,
        metadata={
            "help": "Prompts of the evaluation dataset that each evaluation decodes with and without the head to measure "
            "tau and speedup; 0 turns it off."
        },
    )
    eval_max_new_tokens: int = field(default=64, metadata={"help": "Most tokens of such an answer."})
    num_draft_tokens: str | None = field(
        default="measure",
        metadata={
            "help": "Drafted tokens that are verified in a step, saved with the head: a number, `auto`, or `measure` to "
            "choose what is fastest here at the end of training."
        },
    )

    def __post_init__(self) -> None:
        """Check what only this class knows of, and compute in what the processor has.

        Raises:
            ImportError: If the log is to be sent to what is not installed.
            ValueError: If a value is out of its range, has no effect on a head, or does not go with another.
        """
        self._check_values()
        if (self.bf16 or self.bf16_full_eval) and not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()
        if self.bf16 and self.device.type == "cpu" and native_dtype(self.device) != torch.bfloat16:
            logger.warning("This processor has no bfloat16 instructions: the head is trained in float32 instead.")
            self.bf16, self.mixed_precision = False, "no"
        missing = sorted({name for name in self.report_to if name in INTEGRATION_TO_CALLBACK})
        if missing := [name for name in missing if name not in get_available_reporting_integrations()]:
            raise ImportError(f"report_to={missing[0]} needs a package that is missing: install {missing[0]}.")
        if self.num_draft_steps > 1 and self.n_gpu > 1:
            raise ValueError(
                f"expected one process for each of the {self.n_gpu} accelerators with num_draft_steps > 1, got one for "
                "all: start with `torchrun --nproc-per-node` or `accelerate launch`."
            )

    @property
    def draft_step_weights(self) -> torch.Tensor:
        """Weights of the trained draft steps in the loss, of shape `(num_draft_steps,)`."""
        return self.draft_step_decay ** torch.arange(self.num_draft_steps, dtype=torch.float32)

    def _check_values(self) -> None:
        for name, (smallest, is_allowed) in _SMALLEST.items():
            value = getattr(self, name)
            if value is None:
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or value < smallest or (value == smallest and not is_allowed):
                wanted = f"of at least {smallest}" if is_allowed else f"above {smallest}"
                raise ValueError(f"expected {name} {wanted}, got {value!r}")
        for name, nothing in (("label_smoothing_factor", 0.0), ("neftune_noise_alpha", None)):
            if (value := getattr(self, name)) not in (nothing, None):
                raise ValueError(
                    f"expected no {name}, got {value}: a head learns from the target's distribution and features, so that "
                    "it has no effect. Leave it out."
                )
        if not (self.feature_loss_weight or self.logits_loss_weight):
            raise ValueError("expected feature_loss_weight or logits_loss_weight above 0, got 0 for both")
        self._check_num_draft_tokens(self.num_draft_tokens)

    @staticmethod
    def _check_num_draft_tokens(value: Any) -> None:
        most = MOST["num_draft_tokens"]
        is_number = str(value).isdecimal() and 1 <= int(value) <= most
        if not is_number and value not in (None, "auto", "measure"):
            raise ValueError(
                f"expected num_draft_tokens as a number from 1 to {most}, `auto` or `measure`, got {value!r}"
            )
