"""Arguments of [`FSPADTrainer`]."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class FSPADTrainingArguments(TrainingArguments):
    """Arguments of [`FSPADTrainer`]. The defaults are the values of the paper (arXiv 2408.15562).

    Only what differs from [`~transformers.TrainingArguments`] is listed.

    Args:
        learning_rate: Initial learning rate of AdamW.
        adam_beta2: Second beta of AdamW.
        warmup_steps: Steps of linear warm-up.
        num_train_epochs: Passes over the dataset.
        max_grad_norm: Gradient norm clipping; off, because gradients are clipped by value.
        max_grad_value: Largest absolute value of a gradient's element; `None` turns it off.
        remove_unused_columns: Must stay `False`: the columns belong to the data collator, not to the head's `forward`.
        ddp_find_unused_parameters: Off, because every parameter of a head has a gradient in every step.
        max_length: Dialogues are cut to this many tokens.
        packing: Whether to put several dialogues into one row of up to `max_length` tokens.
        num_draft_steps: Draft steps that are trained; from the second on the head sees its own features, as it does when
            it drafts. 1 is the paper's training.
        feature_loss_weight: Weight of the regression of the target's features.
        logits_loss_weight: Weight of the soft cross-entropy against the target's distribution.
        feature_noise: Width of the uniform noise on the input features at 512 tokens; it shrinks as `1 / length`.
        logits_chunk_size: Positions whose logits over the vocabulary are held in memory at once.
        num_eval_prompts: Prompts of the evaluation dataset, its first distinct ones, that each evaluation decodes plainly
            and with the head to measure tau and speedup; 0 turns it off.
        eval_max_new_tokens: Most tokens of such an answer.
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "Initial learning rate of AdamW."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second beta of AdamW."})
    warmup_steps: float = field(
        default=2000, metadata={"help": "Steps of linear warm-up; a value below 1 is a share of all steps."}
    )
    num_train_epochs: float = field(default=20.0, metadata={"help": "Passes over the dataset."})
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
    num_draft_steps: int = field(
        default=1,
        metadata={
            "help": "Draft steps that are trained, from the second on on the head's own features; 1: the paper."
        },
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
        default=128, metadata={"help": "Positions whose logits over the vocabulary are held in memory at once."}
    )
    num_eval_prompts: int = field(
        default=4,
        metadata={
            "help": "Prompts of the evaluation dataset that each evaluation decodes with and without the head to measure "
            "tau and speedup; 0 turns it off."
        },
    )
    eval_max_new_tokens: int = field(default=64, metadata={"help": "Most tokens of such an answer."})

    def __post_init__(self) -> None:
        """Check what only this class knows of.

        Raises:
            ValueError: If there is no draft step to train, or there are several for `torch.nn.DataParallel`; or if there
                are fewer prompts than none to evaluate on, or no tokens to answer them with.
        """
        super().__post_init__()
        for name, smallest in (("num_eval_prompts", 0), ("eval_max_new_tokens", 1)):
            if getattr(self, name) < smallest:
                raise ValueError(f"expected {name} of at least {smallest}, got {getattr(self, name)}")
        if self.num_draft_steps < 1:
            raise ValueError(f"expected num_draft_steps of at least 1, got {self.num_draft_steps}")
        if self.num_draft_steps > 1 and self.n_gpu > 1:
            raise ValueError(
                f"expected one process for each of the {self.n_gpu} accelerators with num_draft_steps > 1, got one for "
                "all: start with `torchrun --nproc-per-node` or `accelerate launch`."
            )
