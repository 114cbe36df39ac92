"""What a trainer knows of the head that it trains, for the head's model card."""

from __future__ import annotations

import re
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
import transformers

import fspad
from fspad.bench.machine import describe_machine
from fspad.hub_cards import FSPADModelCard, Training, read_evaluations

from .loss import counted_rows

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from .trainer import FSPADTrainer
    from .training_arguments import FSPADTrainingArguments

MASK_POLICY = (
    "of the assistant's tokens, those that come after another one: the first token of an answer is known before drafting "
    "begins"
)
# What of the arguments decides about the head.
RECIPE = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "weight_decay",
    "max_grad_value",
    "max_grad_norm",
    "feature_loss_weight",
    "logits_loss_weight",
    "feature_noise",
    "num_draft_steps",
    "draft_step_decay",
    "max_length",
    "packing",
    "bf16",
    "fp16",
    "seed",
)


def make_card(trainer: FSPADTrainer, dataset: str | None = None, **facts: Any) -> FSPADModelCard:
    """The card of the head in a trainer, with what the trainer knows: the training, the target, the repository.

    What was logged in training stays apart from `measurements`, which are measured with care and afterwards.

    Args:
        trainer: The trainer.
        dataset: What the dialogues are and who wrote the answers, in words.
        **facts: Fields of the card that the trainer does not know, or knows worse.

    Returns:
        The card.
    """
    known = {
        # `None` as long as there is no repository; the arguments may lack the user's name.
        "repo_id": trainer.hub_model_id,
        "training": describe_training(trainer, dataset),
        "datasets": hub_datasets(trainer.train_dataset),
    }
    if (adapter := getattr(trainer.target, "active_peft_config", None)) is not None:
        known["target_weights"] = f"with an adapter ({adapter.peft_type.value})"
    return FSPADModelCard(trainer.model.config, **{**known, **facts})


def describe_training(trainer: FSPADTrainer, dataset: str | None = None) -> Training:
    """What a trainer knows of the training it did.

    Args:
        trainer: The trainer; if it has done no step, nothing that it would do is told.
        dataset: What the dialogues are and who wrote the answers, in words.

    Returns:
        The training.
    """
    args, state = trainer.args, trainer.state
    evaluations = read_evaluations(state.log_history)
    if not state.global_step:
        return Training(evaluations=evaluations)
    num_dialogs, num_answer_tokens = _count_dialogues(trainer.train_dataset)
    is_best = args.load_best_model_at_end and state.best_global_step
    return Training(
        dataset=dataset,
        num_dialogs=num_dialogs,
        num_answer_tokens=num_answer_tokens,
        steps=state.global_step,
        epochs=None if state.epoch is None else round(state.epoch, 2),
        mask_policy=MASK_POLICY,
        recipe=_recipe(args),
        hardware=_describe_devices(args.device, args.world_size * max(1, args.n_gpu)),
        versions={
            "fspad": fspad.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **{name: metadata.version(name) for name in ("accelerate", "datasets")},
        },
        target_dtype=str(trainer.target.dtype).removeprefix("torch."),
        saved_step=state.best_global_step if is_best else None,
        evaluations=evaluations,
        evaluated_on=(
            f"the first {args.num_eval_prompts} prompts of the evaluation data, which were not trained on unless they "
            f"are in both, with at most {args.eval_max_new_tokens} new tokens each,"
        ),
    )


def hub_datasets(dataset: Any) -> list[str]:
    """The Hub ids of the datasets that a dataset was loaded from.

    Args:
        dataset: A dataset of `datasets`, or anything else, which has none.
    """
    sources = getattr(getattr(dataset, "info", None), "download_checksums", None) or ()
    return sorted({match[1] for source in sources if (match := re.match(r"hf://datasets/([^@]+)@", source))})


def _recipe(args: FSPADTrainingArguments) -> dict[str, Any]:
    """The hyperparameters; switches and clipping that are off are left out."""
    batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    values = {name: getattr(args, name) for name in RECIPE}
    values["max_grad_norm"] = args.max_grad_norm or None
    recipe = {"train_batch_size": batch_size, **values}
    return {
        name: getattr(value, "value", value)
        for name, value in recipe.items()
        if value is not None and value is not False
    }


def _count_dialogues(dataset: Dataset | IterableDataset | None) -> tuple[int | None, int | None]:
    """Dialogues in a prepared dataset, and positions in them that the loss counts; `None` of a stream."""
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        return None, None
    is_packed = "position_ids" in dataset.column_names
    columns = ["assistant_mask", *(["position_ids"] if is_packed else [])]
    num_dialogs, num_tokens = 0 if is_packed else len(dataset), 0
    for batch in dataset.select_columns(columns).with_format("torch").iter(1000):
        num_tokens += sum(int(counted_rows(mask).sum()) for mask in batch["assistant_mask"])
        if is_packed:
            num_dialogs += sum(int((positions == 0).sum()) for positions in batch["position_ids"])
    return num_dialogs, num_tokens


def _describe_devices(device: torch.device, number: int) -> str:
    name = describe_machine(device)
    if device.type == "cpu":
        # Processes may share the cores.
        return name if number == 1 else f"{name}, {number} processes"
    return name if number == 1 else f"{number} x {name}"
