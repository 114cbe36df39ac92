"""The model card of a head: what is known about it, as front matter and as text. What is unknown is left out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from fspad import FSPADConfig
from fspad.versions import OLDEST_TESTED

TEMPLATE = Path(__file__).with_name("model_card_template.md")
TAGS = ("speculative-decoding", "draft-model", "fspad", "arxiv:2408.15562")
METRICS = {"tau": "Mean tokens per step of the target", "speedup": "Tokens per second relative to plain generate"}


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

    def facts(self) -> list[tuple[str, str]]:
        """The known fields, as a label and a text each."""
        recipe = [f"`{name}={_inline(value)}`" for name, value in self.recipe.items() if value is not None]
        versions = [f"{name} {_inline(version)}" for name, version in self.versions.items()]
        facts = {
            "Data": self.dataset,
            "Dialogues": _count(self.num_dialogs),
            "Answer tokens": _count(self.num_answer_tokens),
            "Optimizer steps": _count(self.steps),
            "Epochs": None if self.epochs is None else f"{self.epochs:g}",
            "Positions in the loss": self.mask_policy,
            "Hyperparameters": ", ".join(recipe),
            "Hardware": self.hardware,
            "Versions": ", ".join(versions),
        }
        return [(label, _inline(value)) for label, value in facts.items() if value]


@dataclass(frozen=True)
class Measurement:
    """One run over a set of prompts, batch size 1.

    Args:
        prompts: Name of the set of prompts.
        temperature: 0 for greedy decoding.
        tau: Mean tokens per verification step, bonus token included.
        speedup: Tokens per second by those of plain `generate` in the same run, prefill included.
        tokens_per_second: Speed with the head.
        num_prompts: Size of the set.
        machine: What it ran on.
        dtype: Dtype of target and head.
        threads: Threads that torch used.

    Raises:
        ValueError: If a number cannot come from a measurement.
    """

    prompts: str
    temperature: float
    tau: float
    speedup: float | None = None
    tokens_per_second: float | None = None
    num_prompts: int | None = None
    machine: str | None = None
    dtype: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        # A step emits the target's own token at least, so that a smaller tau is a mistake in counting.
        for name, least in {"temperature": 0, "tau": 1, "speedup": 0, "tokens_per_second": 0}.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise ValueError(
                    f"expected {name} to be a finite number of at least {least}, got {value}: measure again."
                )

    def eval_results(self) -> list[EvalResult]:
        """The entries of the model index: tau, and the speedup if it is known."""
        names = ("num_prompts", "dtype", "threads", "machine")
        known = [f"{name}={_inline(value)}" for name in names if (value := getattr(self, name)) is not None]
        values = {name: value for name in METRICS if (value := getattr(self, name)) is not None}
        return [
            EvalResult(
                task_type="text-generation",
                dataset_type=re.sub(r"\W+", "-", self.prompts.lower()).strip("-") or "prompts",
                dataset_name=self.prompts,
                # huggingface_hub puts results together that differ in nothing but name, arguments and metric.
                dataset_config=", ".join([f"temperature={self.temperature:g}", *known]),
                metric_type=name,
                metric_name=METRICS[name],
                metric_value=round(float(value), 2),
            )
            for name, value in values.items()
        ]


_COLUMNS: dict[str, Callable[[Measurement], str | None]] = {
    "Prompts": lambda m: m.prompts,
    "Number": lambda m: _count(m.num_prompts),
    "Temperature": lambda m: f"{m.temperature:g}" if m.temperature else "0 (greedy)",
    "tau": lambda m: f"{m.tau:.2f}",
    "Speedup": lambda m: None if m.speedup is None else f"{m.speedup:.2f}x",
    "Tokens/s": lambda m: None if m.tokens_per_second is None else f"{m.tokens_per_second:.1f}",
    "Machine": lambda m: m.machine,
    "Dtype": lambda m: m.dtype,
    "Threads": lambda m: _count(m.threads),
}


@dataclass
class FSPADModelCard:
    """Model card of an FSPAD head.

    Args:
        head_config: Configuration of the head.
        repo_id: Repository of the head on the Hub; `None` for a head in a folder.
        revision: Commit that the snippet pins.
        path: Folder of a head without a repository, relative to where the snippet is run.
        target: Hub id of the target; by default what the head's configuration says, if that is a Hub id.
        target_revision: Revision of the target; by default that of the head's configuration.
        target_weights: Which weights of the target were used for training and measuring, if not the Hub's own.
        training: How the head was trained.
        measurements: What was measured, in the order of the table.
        license: Identifier of the head's license, as the Hub spells it.
        license_note: Where the license comes from: those of the target and of the training data.
        datasets: Hub ids of the training data.

    Raises:
        ValueError: If an id is no Hub id, the path is absolute, or there is a revision without a repository.
    """

    head_config: FSPADConfig
    repo_id: str | None = None
    revision: str | None = None
    path: str | None = None
    target: str | None = None
    target_revision: str | None = None
    target_weights: str | None = None
    training: Training | None = None
    measurements: Sequence[Measurement] = ()
    license: str | None = None
    license_note: str | None = None
    datasets: Sequence[str] = ()

    def __post_init__(self) -> None:
        for repo_id in (self.repo_id, self.target, *self.datasets):
            if repo_id is not None:
                validate_repo_id(repo_id)
        if self.revision is not None and self.repo_id is None:
            raise ValueError(f"expected a repo_id with the revision {self.revision!r}, got None: name the repository.")
        if self.path is not None and Path(self.path).is_absolute():
            raise ValueError(f"expected a path that holds on other machines, got {self.path!r}: make it relative.")
        recorded = self.head_config.target_model_name
        if self.target is None and recorded is not None and _is_hub_id(recorded):
            self.target = recorded
        # The recorded revision is one of the recorded target, and of no other.
        if self.target is not None and self.target_revision is None and self.target == recorded:
            self.target_revision = self.head_config.target_revision

    def data(self) -> ModelCardData:
        """The front matter."""
        results = [result for measurement in self.measurements for result in measurement.eval_results()]
        name = (self.repo_id or self.path or "fspad-head").rstrip("/").rsplit("/", 1)[-1]
        return ModelCardData(
            base_model=self.target,
            base_model_relation=None if self.target is None else "adapter",
            library_name="transformers",
            pipeline_tag="text-generation",
            license=self.license,
            datasets=list(self.datasets) or None,
            tags=list(TAGS),
            model_name=name if results else None,
            eval_results=results or None,
        )

    def render(self) -> ModelCard:
        """The whole card; `str` of it is the text, with the front matter."""
        card = ModelCard.from_template(
            self.data(),
            template_path=str(TEMPLATE),
            card=self,
            config=self.head_config,
            training_facts=[] if self.training is None else self.training.facts(),
            results_table=_results_table(self.measurements),
            oldest_transformers=".".join(map(str, OLDEST_TESTED)),
        )
        card.text += "\n"  # Jinja drops the newline at the end of a template
        return card

    def save(self, folder: str | Path) -> Path:
        """Write `README.md` into the folder of the head, and return its path; `ModelCard.load` reads it again."""
        path = Path(folder) / "README.md"
        self.render().save(path)
        return path


def _results_table(measurements: Sequence[Measurement]) -> list[str]:
    """Lines of a Markdown table without the columns that no measurement fills."""
    columns = {heading: [text(measurement) for measurement in measurements] for heading, text in _COLUMNS.items()}
    columns = {heading: cells for heading, cells in columns.items() if any(cells)}
    rows = zip(*columns.values(), strict=True)
    cells = [[_inline(cell or "").replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (list(columns), ["---"] * len(columns), *cells)] if cells else []


def _is_hub_id(name: str) -> bool:
    """Whether a name that transformers recorded is a Hub id, and not the folder a target was loaded from."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _count(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _inline(value: Any) -> str:
    """Text in one line, since a line break would end a row or an item."""
    return " ".join(str(value).split())
