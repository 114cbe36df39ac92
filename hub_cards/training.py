"""How a head was trained, as its trainer knows it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
import transformers

import fspad
from fspad.bench.machine import describe_machine
from fspad.bench.markdown import count, inline, table

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from fspad.trainer import FSPADTrainer, FSPADTrainingArguments

MASK_POLICY = (
    "of the assistant's tokens, those that come after another one: the first token of an answer is known before drafting "
    "begins"
)
# What of the trainer's arguments decides about the head.
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
    "max_length",
    "packing",
    "bf16",
    "fp16",
    "seed",
)
_EVALUATED = re.compile(r"eval_(?:(?P<prompts>.+)_)?(?P<what>tau|speedup|accuracy(?:_depth_(?P<depth>\d+))?)")
MOST_ROWS = 10


@dataclass(frozen=True)
class Evaluation:
    """What the trainer measured at one step of the training.

    Args:
        step: Optimizer steps done.
        dataset: Name of the evaluation dataset, where there are several.
        tau: Mean tokens per verification step, by speculative decoding.
        speedup: Tokens per second by those of plain `generate`.
        accuracies: By depth in the draft, how often the token that the head thinks most probable is the target's.
    """

    step: int
    dataset: str | None = None
    tau: float | None = None
    speedup: float | None = None
    accuracies: Sequence[float] = ()


def read_evaluations(log_history: Iterable[Mapping[str, Any]]) -> list[Evaluation]:
    """The evaluations in a trainer's log.

    Args:
        log_history: `trainer.state.log_history`, or the list of that name in `trainer_state.json`.

    Returns:
        By step; of several at one step and dataset, the last values.
    """
    found: dict[tuple[int, str | None], dict[str, float]] = {}
    for entry in log_history:
        for key, value in entry.items():
            if match := _EVALUATED.fullmatch(key):
                found.setdefault((entry["step"], match["prompts"]), {})[match["what"]] = value
    evaluations = []
    for (step, dataset), values in found.items():
        depths = sorted((int(name.rpartition("_")[2]), name) for name in values if name.startswith("accuracy_depth_"))
        names = ["accuracy", *(name for _, name in depths)]
        accuracies = tuple(values[name] for name in names if name in values)
        evaluations.append(Evaluation(step, dataset, values.get("tau"), values.get("speedup"), accuracies))
    return sorted(evaluations, key=lambda evaluation: evaluation.step)


@dataclass(frozen=True)
class Training:
    """How a head was trained. Every field may be unknown.

    Args:
        dataset: What the dialogues are and who wrote the answers, in words.
        num_dialogs: Dialogues trained on.
        num_answer_tokens: Tokens in them that the loss counts, once through the dataset.
        steps: Optimizer steps.
        epochs: Passes over the dataset.
        mask_policy: Which positions the loss counts, in words.
        recipe: Hyperparameters by name.
        hardware: What it ran on.
        versions: Releases by package.
        target_dtype: Dtype of the target, whose features the head learned from.
        saved_step: The step whose weights were kept, if not the last.
        evaluations: What was measured on the way.
        evaluated_on: Which prompts tau was measured on there, in words.
    """

    dataset: str | None = None
    num_dialogs: int | None = None
    num_answer_tokens: int | None = None
    steps: int | None = None
    epochs: float | None = None
    mask_policy: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    hardware: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    target_dtype: str | None = None
    saved_step: int | None = None
    evaluations: Sequence[Evaluation] = ()
    evaluated_on: str | None = None

    @classmethod
    def from_trainer(cls, trainer: FSPADTrainer, dataset: str | None = None) -> Training:
        """What a trainer knows of the training it did.

        Args:
            trainer: The trainer; if it has done no step, nothing that it would do is told.
            dataset: What the dialogues are and who wrote the answers, in words.

        Returns:
            The training.
        """
        args, state = trainer.args, trainer.state
        if not state.global_step:
            return cls(evaluations=read_evaluations(state.log_history))
        num_dialogs, num_answer_tokens = _count_dialogues(trainer.train_dataset)
        is_best = args.load_best_model_at_end and state.best_global_step
        devices = args.world_size * max(1, args.n_gpu)
        return cls(
            dataset=dataset,
            num_dialogs=num_dialogs,
            num_answer_tokens=num_answer_tokens,
            steps=state.global_step,
            epochs=None if state.epoch is None else round(state.epoch, 2),
            mask_policy=MASK_POLICY,
            recipe=_recipe(args),
            hardware=_describe_devices(args.device, devices),
            versions={
                "fspad": fspad.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                **{name: metadata.version(name) for name in ("accelerate", "datasets")},
            },
            target_dtype=str(trainer.target.dtype).removeprefix("torch."),
            saved_step=state.best_global_step if is_best else None,
            evaluations=read_evaluations(state.log_history),
            evaluated_on=(
                f"the first {args.num_eval_prompts} prompts of the evaluation data, which were not trained on unless they "
                f"are in both, with at most {args.eval_max_new_tokens} new tokens each,"
            ),
        )

    def facts(self) -> list[tuple[str, str]]:
        """The known fields, as a label and a text each."""
        recipe = [f"`{name}={inline(value)}`" for name, value in self.recipe.items() if value is not None]
        versions = [f"{name} {inline(version)}" for name, version in self.versions.items()]
        facts = {
            "Data": self.dataset,
            "Dialogues": count(self.num_dialogs),
            "Answer tokens": count(self.num_answer_tokens),
            "Optimizer steps": count(self.steps),
            "Weights kept": None if self.saved_step is None else f"those of step {count(self.saved_step)}",
            "Epochs": None if self.epochs is None else f"{self.epochs:g}",
            "Positions in the loss": self.mask_policy,
            "Hyperparameters": ", ".join(recipe),
            "Dtype of the target": self.target_dtype,
            "Hardware": self.hardware,
            "Versions": ", ".join(versions),
        }
        return [(label, inline(value)) for label, value in facts.items() if value]

    def evaluations_table(self) -> list[str]:
        """The lines of a table of the evaluations; of many, about ten steps that are spread evenly."""
        steps = sorted({evaluation.step for evaluation in self.evaluations})
        stride = -(-len(steps) // MOST_ROWS) or 1
        shown = set(steps[::-1][::stride])
        rows = [evaluation for evaluation in self.evaluations if evaluation.step in shown]
        columns = {
            "Optimizer steps": [count(row.step) for row in rows],
            "Dataset": [row.dataset for row in rows],
            "tau": [None if row.tau is None else f"{row.tau:.2f}" for row in rows],
            "Speedup": [None if row.speedup is None else f"{row.speedup:.2f}x" for row in rows],
        }
        for depth in range(max((len(row.accuracies) for row in rows), default=0)):
            columns[f"Accuracy, depth {depth + 1}" if depth == 0 else f"Depth {depth + 1}"] = [
                f"{row.accuracies[depth]:.1%}" if row.accuracies[depth:] else None for row in rows
            ]
        return table(columns)


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

    from fspad.trainer.loss import counted_rows

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
