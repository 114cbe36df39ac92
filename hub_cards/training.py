"""How a head was trained, and what was measured on the way."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fspad.bench.markdown import count, inline, table

_EVALUATED = re.compile(r"eval_(?:(?P<prompts>.+)_)?(?P<what>tau|speedup|accuracy(?:_depth_\d+)?)")
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
