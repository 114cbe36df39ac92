"""Train SmolLM2 heads by several recipes on the same dialogues, and compare their tau.

    python examples/compare_recipes.py --output_dir recipes --dialogs dialogues.jsonl --prompts heldout.jsonl \
        --questions question.jsonl --seeds 0 1 2

Every recipe changes one thing of the baseline, FSPAD trained for one draft step. All recipes of a seed begin with the same
random numbers and see the same dialogues in the same order, for the same number of steps. Each run goes on from its last
checkpoint, and is saved before the next begins: the same command goes on after an interruption, and started in several
processes at once (`OMP_NUM_THREADS=1` each), they share the runs. At the end, and with `--only_report` at any time, the
table of the runs that there are is printed: mean tau, standard deviation over the seeds, and their number; beside it, a plot
of tau over the steps is written to `tau_over_steps.png`.

tau is that of the head alone, without lookup: with a tree of 59 tokens, and with a tree whose size suits the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState

from fspad import FSPADConfig, FSPADModel
from fspad.bench.machine import default_device, native_dtype
from fspad.bench.measuring import mean_tokens_per_step, measure
from fspad.bench.methods import REFERENCE_DRAFT_TOKENS
from fspad.bench.plot_style import COLORS, STYLE, save
from fspad.bench.questions import choose_questions, encode_dialogue, read_questions
from fspad.bench.smollm2 import load_smollm2
from fspad.trainer import FSPADTrainer, FSPADTrainingArguments
from fspad.trainer.checks import find_checkpoint
from fspad.trainer.data import count_token_frequencies, most_frequent_tokens, prepare_dataset
from fspad.trainer.dialogues import load_dialogues
from fspad.trainer.evaluation import as_deployed
from fspad.trainer.features import add_features
from fspad.trainer.resumable import find_differences, write_whole

TREES: dict[str, int | str] = {"tree of 59": REFERENCE_DRAFT_TOKENS, "automatic tree": "auto"}
# What the results of a recipe depend on, of the command line
SETTINGS = (
    *("dialogs", "prompts", "num_prompts", "questions", "per_category", "temperatures", "max_new_tokens"),
    *("batch_size", "num_dialogs", "max_length", "max_steps", "learning_rate", "dtype"),
)


@dataclass(frozen=True)
class Recipe:
    """What a run does; the defaults are the baseline.

    Args:
        feature_sampling: Variant of the head.
        partial_alignment: Variant of the head.
        num_draft_steps: Draft steps that are trained.
        draft_step_decay: Weight of each of them by that of the one before.
        logits_loss_weight: Weight of the soft cross-entropy.
        draft_vocab_size: Tokens that the head scores.
    """

    feature_sampling: bool = True
    partial_alignment: bool = True
    num_draft_steps: int = 1
    draft_step_decay: float = 1.0
    logits_loss_weight: float = 0.1
    draft_vocab_size: int = 8192


RECIPES = {
    "eagle": Recipe(feature_sampling=False, partial_alignment=False),
    "feature-sampling": Recipe(partial_alignment=False),
    "partial-alignment": Recipe(feature_sampling=False),
    "fspad": Recipe(),
    "two-draft-steps": Recipe(num_draft_steps=2),
    "three-draft-steps": Recipe(num_draft_steps=3),
    "three-decaying-draft-steps": Recipe(num_draft_steps=3, draft_step_decay=0.5),
    "logits-weight-0.5": Recipe(logits_loss_weight=0.5),
    "vocabulary-16k": Recipe(draft_vocab_size=16384),
}

Inputs = list[dict[str, torch.Tensor]]


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of features, checkpoints and results.")
    parser.add_argument("--results_dir", type=Path, help="Folder of the results; by default the output folder.")
    parser.add_argument("--dialogs", help="JSONL(.gz) or Parquet file of dialogues.")
    parser.add_argument("--prompts", type=Path, help="JSONL file of held-out prompts to measure on.")
    parser.add_argument("--num_prompts", type=int, default=12, help="How many of them.")
    parser.add_argument("--questions", type=Path, help="JSONL file of questions, as Spec-Bench's, to measure on.")
    parser.add_argument("--per_category", type=int, default=2, help="How many of each task.")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES)[:4], help="To compare.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Seeds of every recipe.")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0], help="Of the answers.")
    parser.add_argument("--max_new_tokens", type=int, default=48, help="Longest answer.")
    parser.add_argument("--batch_size", type=int, default=8, help="Dialogues in a batch.")
    parser.add_argument("--num_dialogs", type=int, default=2668, help="Dialogues trained on, the first of the file.")
    parser.add_argument("--max_length", type=int, default=1024, help="Longer dialogues are cut to this many tokens.")
    parser.add_argument("--max_steps", type=int, default=1000, help="Optimizer steps.")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="Of the target.")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="Learning rate, of every recipe.")
    parser.add_argument(
        "--curve", type=int, nargs="*", default=[125, 250, 500], help="Steps at which tau is measured on the way."
    )
    parser.add_argument("--only_report", action="store_true", help="Print the table of the runs that there are.")
    options = parser.parse_args()
    options.results_dir = options.results_dir or options.output_dir
    if options.dtype == "auto":
        options.dtype = str(native_dtype(default_device())).removeprefix("torch.")
    if not options.only_report and None in (options.dialogs, options.prompts, options.questions):
        parser.error("--dialogs, --prompts and --questions are needed to train and measure")
    return options


class MeasureOnTheWay(TrainerCallback):
    """Measures tau at given steps, greedily and with the tree of 59, into the log that checkpoints keep.

    Args:
        target: The target.
        inputs: Prompts.
        options: The command line.
    """

    def __init__(self, target: PreTrainedModel, inputs: Inputs, options: argparse.Namespace):
        self.target, self.inputs, self.options = target, inputs, options

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, model: FSPADModel, **kwargs: Any
    ) -> None:
        """Measure, if this is such a step."""
        if state.global_step in self.options.curve:
            device = self.target.device
            with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
                head = as_deployed(model, self.target)
                lengths = accept_lengths(head, self.target, self.inputs, REFERENCE_DRAFT_TOKENS, 0.0, self.options)
            state.log_history.append({"step": state.global_step, "accept_lengths": lengths})
            control.should_save = True


def train(
    recipe: Recipe,
    seed: int,
    dataset: Dataset,
    counts: torch.Tensor,
    target: PreTrainedModel,
    prompts: Inputs,
    folder: Path,
    options: argparse.Namespace,
) -> tuple[FSPADModel, dict[int, list[int]]]:
    """Train one head, or go on with it.

    Args:
        recipe: How.
        seed: Seed of its weights, of the noise and of the order of the dialogues.
        dataset: Dialogues with features.
        counts: How often the target writes each token, of shape `(vocabulary,)`.
        target: The target.
        prompts: What tau is measured on during training.
        folder: Folder of its checkpoints.
        options: The command line.

    Returns:
        The head in the target's dtype, and accept lengths by step.
    """
    torch.manual_seed(seed)
    variant = {"feature_sampling": recipe.feature_sampling, "partial_alignment": recipe.partial_alignment}
    head = FSPADModel.from_target(target, FSPADConfig.from_target(target.config, **variant)).float()
    head.set_draft_vocabulary(most_frequent_tokens(counts, recipe.draft_vocab_size))
    arguments = FSPADTrainingArguments(
        output_dir=str(folder),
        max_steps=options.max_steps,
        warmup_steps=options.max_steps // 10,
        lr_scheduler_type="cosine",
        learning_rate=options.learning_rate,
        num_draft_steps=recipe.num_draft_steps,
        draft_step_decay=recipe.draft_step_decay,
        num_draft_tokens=None,
        logits_loss_weight=recipe.logits_loss_weight,
        per_device_train_batch_size=options.batch_size,
        train_sampling_strategy="group_by_length",
        bf16=target.dtype == torch.bfloat16,
        seed=seed,
        logging_steps=50,
        save_steps=100,
        save_total_limit=1,
        report_to="none",
    )
    trainer = FSPADTrainer(
        model=head,
        target=target,
        args=arguments,
        train_dataset=dataset,
        callbacks=[MeasureOnTheWay(target, prompts, options)],
    )
    checkpoint = find_checkpoint(str(folder), True) if any(folder.glob("checkpoint-*")) else None
    trainer.train(resume_from_checkpoint=checkpoint)
    curve = {row["step"]: row["accept_lengths"] for row in trainer.state.log_history if "accept_lengths" in row}
    return as_deployed(trainer.model, target), curve


def accept_lengths(
    head: FSPADModel,
    target: PreTrainedModel,
    inputs: Inputs,
    num_draft_tokens: int | str,
    temperature: float,
    options: argparse.Namespace,
) -> list[int]:
    """Accept lengths of all answers to some prompts, of the head alone."""
    head.config.lookup = False
    head.config.num_draft_tokens = num_draft_tokens
    answers = [measure(target, prompt, head, options.max_new_tokens, temperature) for prompt in inputs]
    return [length for answer in answers for length in answer.accept_lengths]


def load_inputs(
    tokenizer: PreTrainedTokenizerBase, target: PreTrainedModel, options: argparse.Namespace
) -> dict[str, Inputs]:
    """What tau is measured on: held-out prompts, and the first turns of questions."""
    prompts = read_questions(options.prompts)[: options.num_prompts]
    questions = choose_questions(read_questions(options.questions), options.per_category)
    return {
        name: [encode_dialogue(tokenizer, question.turns[:1], [], target.device) for question in chosen]
        for name, chosen in (("held-out", prompts), ("Spec-Bench", questions))
    }


def run_all(options: argparse.Namespace) -> None:
    """Do every run that nobody has done or is doing."""
    runs = [(name, seed) for seed in options.seeds for name in options.recipes]
    missing = [run for run in runs if read_result(options, *run) is None]
    if not missing:
        return
    target, tokenizer = load_smollm2(getattr(torch, options.dtype))
    target.to(default_device())
    prepared = prepare_dataset(load_dialogues(options.dialogs), tokenizer, options.max_length)
    prepared = prepared.select(range(options.num_dialogs))
    dataset = add_features(prepared, target, options.output_dir / "features")
    counts = count_token_frequencies(prepared, target.config.vocab_size)
    inputs = load_inputs(tokenizer, target, options)
    for name, seed in missing:
        file = result_file(options, name, seed)
        folder = options.output_dir / file.stem
        try:
            # Let go of by the system if the process dies
            with FileLock(options.output_dir / f"{file.stem}.lock", timeout=0):
                if file.exists():
                    continue
                head, curve = train(RECIPES[name], seed, dataset, counts, target, inputs["held-out"], folder, options)
                measured = [
                    {
                        "prompts": prompts,
                        "tree": tree,
                        "temperature": temperature,
                        "accept_lengths": accept_lengths(
                            head, target, inputs[prompts], TREES[tree], temperature, options
                        ),
                    }
                    for prompts in inputs
                    for tree in TREES
                    for temperature in options.temperatures
                ]
                result = {"settings": find_settings(options, name), "measured": measured, "curve": curve}
                write_whole(file, [json.dumps(result) + "\n"])
        except Timeout:
            continue


def find_settings(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """What the results of a recipe depend on, apart from the seed and the machine."""
    settings = {setting: getattr(options, setting) for setting in SETTINGS}
    files = {setting: Path(settings[setting]).name for setting in ("dialogs", "prompts", "questions")}
    return {**settings, **files, **asdict(RECIPES[name])}


def read_result(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any] | None:
    """Read what a run has measured.

    Args:
        options: The command line.
        name: Its recipe.
        seed: Its seed.

    Returns:
        What was measured, or `None` if there is no such run.

    Raises:
        ValueError: If it was made with other settings.
    """
    file = result_file(options, name, seed)
    if not file.exists():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    if not options.only_report and (differences := find_differences(result["settings"], find_settings(options, name))):
        raise ValueError(f"expected the settings of {file}, got others ({'; '.join(differences)}): use a new folder.")
    return result


def result_file(options: argparse.Namespace, name: str, seed: int) -> Path:
    """The file of a run's result."""
    return options.results_dir / f"{name}-{seed}.json"


def report(options: argparse.Namespace) -> Table:
    """Mean tau of each recipe over its seeds, with the standard deviation between them.

    Args:
        options: The command line.

    Returns:
        The table.
    """
    taus: dict[str, dict[str, list[float]]] = {}
    for name in options.recipes:
        for result in filter(None, (read_result(options, name, seed) for seed in options.seeds)):
            for entry in result["measured"]:
                column = f"{entry['prompts']}, {entry['tree']}, T={entry['temperature']:g}"
                tau = mean_tokens_per_step(entry["accept_lengths"])
                taus.setdefault(column, {}).setdefault(name, []).append(tau)
    table = Table(Column("Recipe", no_wrap=True), *taus, title="tau")
    for name in options.recipes:
        table.add_row(name, *(describe(column.get(name, [])) for column in taus.values()))
    return table


def draw_curves(options: argparse.Namespace, path: Path) -> None:
    """Draw tau over the steps, greedily on held-out prompts with the tree of 59, with the range of the seeds.

    Args:
        options: The command line.
        path: The PNG file.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6))
        axes = figure.add_subplot(xlabel="optimizer steps", ylabel="tau, T=0")
        for name, color in zip(options.recipes, COLORS * len(options.recipes), strict=False):
            taus: dict[int, list[float]] = {}
            for result in filter(None, (read_result(options, name, seed) for seed in options.seeds)):
                for step, lengths in [*result["curve"].items(), (result["settings"]["max_steps"], final(result))]:
                    taus.setdefault(int(step), []).append(mean_tokens_per_step(lengths))
            if taus:
                steps = sorted(taus)
                axes.plot(steps, [statistics.mean(taus[step]) for step in steps], color=color, marker="o", label=name)
                low, high = ([choose(taus[step]) for step in steps] for choose in (min, max))
                axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        axes.legend()
        save(figure, path)


def final(result: dict[str, Any]) -> list[int]:
    """Accept lengths after the last step, measured as on the way."""
    wanted = {"prompts": "held-out", "tree": "tree of 59", "temperature": 0.0}
    return next(row["accept_lengths"] for row in result["measured"] if wanted.items() <= row.items())


def describe(taus: Sequence[float]) -> str:
    """Mean, standard deviation and number of values."""
    if not taus:
        return "-"
    spread = f" ± {statistics.stdev(taus):.2f}" if len(taus) > 1 else ""
    return f"{statistics.mean(taus):.2f}{spread} ({len(taus)})"


def main() -> None:
    """Run what is missing, and print the table."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    options = parse_arguments()
    options.results_dir.mkdir(parents=True, exist_ok=True)
    if not options.only_report:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        run_all(options)
    Console().print(report(options))
    draw_curves(options, options.results_dir / "tau_over_steps.png")


if __name__ == "__main__":
    main()
